"""Shows a training run: live on a terminal, and as plain lines elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING

from rich.text import Text

from cda_cli.console.base import duration, is_live, out, print_pairs, print_trimmed, shows_progress
from cda_cli.console.layer_table import layer_table, measures
from cda_cli.console.live_view import NOTICE, ROOMY, LiveView, ResizableLive
from cda_cli.console.run_status import (
    ALARMS,
    RunStatus,
    alarm_words,
    header_rows,
    metric_rows,
    next_commands,
    plan_rows,
    refused_words,
    train_words,
    validated_on,
    validation_words,
)
from cda_cli.console.text import print_next, print_sentence, printable, write_text
from cda_cli.runs.records import (
    CheckpointRecord,
    HeadAlarm,
    Record,
    RefusedRecord,
    SampleRecord,
    TrainRecord,
    ValidationRecord,
)

if TYPE_CHECKING:
    from cda_cli.training.display import Plan


class TrainingDisplay:
    """The `training.display.Display` of a run."""

    def __init__(self) -> None:
        self._console = out()
        self.interactive = shows_progress()
        self._is_live = is_live(self._console)
        self._dash = "-" if self._console.options.ascii_only else "–"
        self._status: RunStatus | None = None
        self._live: ResizableLive | None = None
        self._held_back: dict[str, str] = {}
        self._alarms: set[HeadAlarm] = set()  # that had a line
        self._saved: int | None = None  # the step of the latest checkpoint

    def busy(self, words: str) -> AbstractContextManager[object]:
        if not self._is_live:
            return nullcontext()
        return self._console.status(
            Text(f"{printable(words)} …"), spinner="line" if self._console.options.ascii_only else "dots"
        )

    def start(self, plan: Plan, history: Iterable[Record]) -> None:
        self._status = RunStatus(plan, plan.first_step)
        for record in history:
            self._status.add(record)
        rows = plan_rows(plan)
        if self._is_live and self._console.height >= ROOMY:
            # They stand in the header of the view; `finish` prints them.
            self._held_back = {name: rows.pop(name) for name in header_rows(plan)}
        print_pairs(self._console, rows)
        self._console.print()
        if self._is_live:
            self._live = ResizableLive(LiveView(self._status), self._console)
            self._live.start(refresh=True)

    def advance(self, step: int, seconds_left: float | None) -> None:
        if self._status:
            self._status.advance(step, seconds_left)

    def show(self, record: Record) -> None:
        assert self._status
        self._status.add(record)
        with self._live.held() if self._live else nullcontext():
            self._print(record, self._status.plan)

    def _print(self, record: Record, plan: Plan) -> None:
        match record:
            case TrainRecord():
                if not self._is_live:
                    self._lines(record, *train_words(record, plan.has_budget, self._dash))
                    if new := [alarm for alarm in record.alarms if alarm not in self._alarms]:
                        self._line(record, Text(f"{ALARMS} {alarm_words(new)}", style="yellow"))
                    self._alarms |= set(new)
            case RefusedRecord():
                self._line(record, Text(refused_words(record), style="yellow"))
            case ValidationRecord():
                self._line(record, Text(f"validation {validation_words(record)}", style="bold"))
            case SampleRecord():
                self._line(record, Text("sample", style="bold"))
                # Masked off a terminal too: a log is read on one later, and metrics.jsonl has the text itself.
                write_text(self._console, printable(record.text) + "\n", style="cyan")
            case CheckpointRecord():
                self._saved = record.step
                self._line(record, Text(f"saved {record.path}"))

    def note(self, text: str) -> None:
        with self._live.held() if self._live else nullcontext():
            print_sentence(self._console, text, style="yellow")

    def stopping(self) -> None:
        """Answers a request to stop at once, also where the step takes minutes. A signal handler may call it."""
        if self._status:
            self._status.is_stopping = True  # The view shows it, a quarter of a second later at most.
        if not self._live and sys.stderr.isatty():
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"{NOTICE}\n".encode())

    def finish(self) -> None:
        """Leaves the latest metrics as a table, and says what to run next."""
        if self._live:
            self._live.stop()
        status = self._status
        if not status or not status.train:
            return
        console = self._console
        rows = {
            **self._held_back,
            "step": f"{status.step} of {status.plan.steps}, in {duration(status.elapsed)}",
            **metric_rows(status),
        }
        if status.validation:
            rows["validated on"] = validated_on(status.plan, status.validation)
        console.print()
        print_pairs(console, rows)
        console.print()
        # Off a terminal nothing is left out.
        most = max(4, console.height - len(rows) - 8) if self._is_live else None
        layers = status.train.layers
        print_trimmed(console, layer_table(layers, measures(layers, status.plan.has_budget), most, self._dash))
        if self._saved == status.step and (commands := next_commands(status)):
            print_next(console, commands)

    def _line(self, record: Record, words: Text) -> None:
        print_sentence(self._console, Text.assemble((self._step(record), "dim"), words))

    def _lines(self, record: Record, *groups: list[str]) -> None:
        """Prints each group of parts as a line, or as several where it does not fit. All but the first are indented."""
        step = self._step(record)
        lines = [step]
        for group in groups:
            for index, part in enumerate(group):
                joined = f"{lines[-1]}{part}"
                if index and len(joined) > self._console.width:
                    lines.append(" " * len(step) + f"{part}  ")
                else:
                    lines[-1] = f"{joined}  "
            lines.append(" " * len(step))
        for line in lines[:-1]:
            self._console.print(Text(line.rstrip()), soft_wrap=True)

    def _step(self, record: Record) -> str:
        assert self._status
        steps = self._status.plan.steps
        return f"{record.step:>{len(str(steps))}}/{steps}  "
