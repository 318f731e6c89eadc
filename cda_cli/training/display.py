"""What training tells a person, and the interface of whatever shows it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from cda_cli.runs.records import Record


class Plan(NamedTuple):
    """What a run is about to do. `epochs`, the passes over the text, is None for streamed data."""

    run: Path
    data: str
    parameters: int
    device: str
    dtype: str
    compiled: bool
    cuda_graphs: bool
    backend: str
    first_step: int
    steps: int
    tokens_per_step: int
    epochs: float | None
    processes: str = "1"


class Display(Protocol):
    """Shows a run to a person. If it is `interactive`, stderr is a terminal, on which progress may be drawn."""

    interactive: bool

    def start(self, plan: Plan) -> None:
        """Called before the first step."""

    def advance(self, step: int) -> None:
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

    def start(self, plan: Plan) -> None: ...

    def advance(self, step: int) -> None: ...

    def show(self, record: Record) -> None: ...

    def note(self, text: str) -> None: ...

    def finish(self) -> None: ...
