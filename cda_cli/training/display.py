"""What training tells a person, and the interface of whatever shows it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple, Protocol

from cda_cli.config import Config
from cda_cli.runs.records import Record


class Plan(NamedTuple):
    """What a run is about to do.

    `attention` describes the rule in words; `has_budget` says whether its rows have a k. `epochs`, the passes over the
    text, and `validation_windows`, those of the whole validation text, are None for streamed data. `prompt` is one for
    a person to try the model with.
    """

    run: Path
    config: Config
    data: str
    parameters: int
    attention: str
    has_budget: bool
    device: str
    dtype: str
    compiled: bool
    cuda_graphs: bool
    backend: str
    first_step: int
    steps: int
    tokens_per_step: int
    epochs: float | None
    validation_windows: int | None
    processes: str = "1"
    prompt: str | None = "The "


class Display(Protocol):
    """Shows a run to a person. If it is `interactive`, stderr is a terminal, on which progress may be drawn."""

    interactive: bool

    def busy(self, words: str) -> AbstractContextManager[object]:
        """Shows what the time is spent on, while the context lasts."""

    def start(self, plan: Plan, history: Iterable[Record]) -> None:
        """Called before the first step. `history` are the records of a run that goes on, oldest first."""

    def advance(self, step: int, seconds_left: float | None) -> None:
        """Called after each step."""

    def show(self, record: Record) -> None:
        """Shows a record, which went into metrics.jsonl."""

    def note(self, text: str) -> None:
        """Shows a sentence."""

    def finish(self) -> None:
        """Called when no more steps come, for whatever reason."""


class NullDisplay:
    """The display of the processes that print nothing."""

    interactive = False

    def busy(self, words: str) -> AbstractContextManager[object]:
        return nullcontext()

    def start(self, plan: Plan, history: Iterable[Record]) -> None: ...

    def advance(self, step: int, seconds_left: float | None) -> None: ...

    def show(self, record: Record) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self) -> None: ...
