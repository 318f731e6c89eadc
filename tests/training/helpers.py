"""A display that remembers what it is shown, and training without a command line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from cda_cli.config import Config, parse
from cda_cli.runs.folder import Run
from cda_cli.runs.records import Record
from cda_cli.signals import StopRequest
from cda_cli.training.display import Plan
from cda_cli.training.run import run_training


class Memory:
    """A `Display` that keeps what it is shown, and can send this process SIGINT after a step."""

    interactive = False

    def __init__(self, stop_after: int | None = None) -> None:
        self.stop_after = stop_after
        self.plan: Plan | None = None
        self.history: list[Record] = []
        self.records: list[Record] = []
        self.notes: list[str] = []
        self.finished = 0

    def busy(self, words: str) -> AbstractContextManager[object]:
        return nullcontext()

    def start(self, plan: Plan, history: Iterable[Record]) -> None:
        self.plan = plan
        self.history = list(history)

    def advance(self, step: int, seconds_left: float | None) -> None:
        if step == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)

    def show(self, record: Record) -> None:
        self.records.append(record)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finish(self) -> None:
        self.finished += 1


def changed(config: Config, **optim: object) -> Config:
    return config.model_copy(update={"optim": config.optim.model_copy(update=optim)})


def with_settings(config: Config, settings: Mapping[str, object]) -> Config:
    """Returns `config` with other values of settings, named as `--set` names them."""
    values = config.model_dump()
    for key, value in settings.items():
        section, name = key.split(".")
        values[section][name] = value
    return parse(values)


def trained(config: Config, run: Path, resume: str = "auto", stop_after: int | None = None) -> Memory:
    """Trains into `run`, or resumes it, and returns what the display was shown."""
    display = Memory(stop_after)
    with StopRequest() as stop:
        run_training(config, Run(run), resume, display, stop)
    return display


def losses(run: Path) -> dict[int, float]:
    """Returns the loss of each step, to the last bit: JSON holds the shortest decimal that reads back the same."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
