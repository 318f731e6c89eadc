"""A table of runs, and below each the settings in which they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

from cda_cli.console.base import out
from cda_cli.console.sparkline import sparkline
from cda_cli.console.text import printable
from cda_cli.settings_table import as_written

if TYPE_CHECKING:
    from cda_cli.runs.summary import Summary

HEADER = ("run", "state", "steps", "best", "at", "train", "loss")
STYLES = {"running": "cyan", "finished": "green", "interrupted": "yellow", "imported": "blue"}
CURVE = 12  # characters
GAP = "  "


def show_runs(runs: Sequence[Summary], differing: Sequence[str], problems: Mapping[Path, str]) -> None:
    """One line for each run, one for the settings `differing` and for each fault, and at the end one for each problem.

    A name is never cut, as it is there to be copied: one that is too long has a line of its own.
    """
    console = out()
    rows = [_cells(run) for run in runs]
    widths = [max(map(cell_len, column)) for column in zip(HEADER, *rows, strict=True)]
    widths[0] = max(4, min(widths[0], console.width - sum(widths[1:]) - len(GAP) * len(widths[1:])))
    if runs:
        console.print(Text(_line(HEADER, widths), style="bold"))
    for run, row in zip(runs, rows, strict=True):
        line = Text(_line(row, widths))
        start = line.plain.index(run.state, len(row[0]))
        line.stylize(STYLES[run.state], start, start + len(run.state))
        console.print(line, soft_wrap=True)
        words = " ".join(f"{key}={printable(as_written(run.settings[key]))}" for key in differing)
        for part in Text(words).wrap(console, console.width - len(GAP)) if words else ():
            console.print(Text(GAP + part.plain.rstrip(), style="dim"), soft_wrap=True)
        for fault in run.faults:
            console.print(Text(GAP + printable(fault), style="yellow"), soft_wrap=True)
    if not runs:
        console.print("no runs")
    for path, problem in problems.items():
        console.print(Text(printable(f"{path}: {problem}"), style="yellow"), soft_wrap=True)


def _cells(run: Summary) -> tuple[str, ...]:
    best, train = (f"{loss:.4f}" if loss is not None else "–" for loss in (run.best_loss, run.train_loss))
    at = "–" if run.best_step is None else str(run.best_step)
    name = printable(str(run.path))
    return name, run.state, f"{run.step}/{run.steps}", best, at, train, sparkline(run.losses, CURVE)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """The name, state and curve to the left of their columns, numbers to the right."""
    name, state, *numbers, curve = cells
    wide = cell_len(name) > widths[0]
    first = f"{name}\n{' ' * widths[0]}" if wide else name + " " * (widths[0] - cell_len(name))
    aligned = [f"{number:>{width}}" for number, width in zip(numbers, widths[2:-1], strict=True)]
    return GAP.join([first, f"{state:<{widths[1]}}", *aligned, curve]).rstrip()
