"""The loss against the keys kept, as a chart of characters: each choice has a mark of its own, which also reads without
colour."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.text import Text

from cda_cli.console.base import can_show
from cda_cli.scales import LINEAR_BELOW

if TYPE_CHECKING:
    from cda_cli.evaluation import Estimate

MARKS, ASCII_MARKS = "●■▲◆▼✚✖", "o#^*vx+"
BAR, ASCII_BAR = "│", "|"
COLOURS = ("bold cyan", "yellow", "green", "magenta", "blue", "red", "white")
LABEL_WIDTH = 8
LARGEST_CELL = 8
ROWS = 14  # at most, but for an axis of many powers of ten


def cut_chart(lines: Mapping[str, Mapping[int, Estimate]], width: int) -> Text:
    """Draws the `lines`, each by its numbers of keys, with their intervals as bars, in at most `width` columns.

    The marks of one number of keys stand side by side, so none hides another.
    """
    marks, bar = (MARKS, BAR) if can_show(MARKS + BAR) else (ASCII_MARKS, ASCII_BAR)
    numbers = sorted({number for line in lines.values() for number in line})
    cell = max(len(lines) + 1, min(LARGEST_CELL, (width - LABEL_WIDTH - 1) // len(numbers)))
    ends = [end for line in lines.values() for value, _, *others in line.values() for end in (value, *others)]
    places = [_place(end) for end in ends if math.isfinite(end)]
    lowest, highest = math.floor(min(0.0, *places)), math.ceil(max(1.0, *places))
    steps = max(2, (ROWS - 1) // (highest - lowest))  # rows from one figure of the axis to the next

    def to_row(value: float) -> int:
        return round((_place(value) - lowest) * steps)

    canvas: dict[tuple[int, int], tuple[str, str]] = {}
    for index, line in enumerate(lines.values()):
        colour = COLOURS[index % len(COLOURS)]
        for number, (value, _, low, high) in line.items():
            column = cell * numbers.index(number) + (cell - len(lines)) // 2 + index
            if math.isfinite(low) and math.isfinite(high):
                canvas |= {(row, column): (bar, colour) for row in range(to_row(low), to_row(high) + 1)}
            if math.isfinite(value):
                canvas[to_row(value), column] = (marks[index % len(marks)], colour)
    drawn = Text(no_wrap=True, overflow="crop")
    zero = -lowest * steps
    for row in range((highest - lowest) * steps, -1, -1):
        label = _label(lowest + row // steps) if row % steps == 0 else ""
        drawn.append(f"{label:>{LABEL_WIDTH - 2}} {'┤' if can_show('┤') else '|'}")
        for column in range(cell * len(numbers)):
            character, style = canvas.get((row, column), ("-" if row == zero else " ", "dim"))
            drawn.append(character, style=style)
        drawn.rstrip()
        drawn.append("\n")
    headings = "".join(f"{number:^{cell}}" for number in numbers)
    drawn.append(f"{'keys':>{LABEL_WIDTH - 2}}  {headings}".rstrip() + "\n", style="bold")
    drawn.append(" " * LABEL_WIDTH)
    for index, name in enumerate(lines):
        drawn.append(f"{marks[index % len(marks)]} {name}", style=COLOURS[index % len(COLOURS)])
        drawn.append("   ")
    drawn.rstrip()
    return drawn


def _place(value: float) -> float:
    """Where a value stands on the axis: n for 10ⁿ⁻¹ · LINEAR_BELOW, and a share of 1 below that."""
    size = abs(value) / LINEAR_BELOW
    return math.copysign(size if size <= 1 else 1 + math.log10(size), value)


def _label(place: int) -> str:
    return f"{math.copysign(LINEAR_BELOW * 10.0 ** (abs(place) - 1), place):+g}" if place else "0"
