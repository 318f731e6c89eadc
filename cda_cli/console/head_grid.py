"""Draws one figure of every head: layers down, heads across, on colours, or in shades where there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

from cda_cli.console.heat_map import COLOURS, SHADES
from cda_cli.scales import CIVIDIS

LAYER_WIDTH = 5
NUMBER_WIDTH = 4
BAR_WIDTH = 32  # columns of the scale of colours


def head_grid(
    layers: Sequence[int], heads: Sequence[int], figures: Sequence[Sequence[float]], width: int, is_coloured: bool
) -> Text:
    """Draws figures [layer][head], with their numbers if these fit into `width` columns, and otherwise without.

    With colours, a cell has that of its figure behind it. Without, each of five equal steps from the lowest to the
    highest figure has a shade. NaN is a dash.
    """
    finite = [figure for row in figures for figure in row if math.isfinite(figure)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    cell = next((size for size in (NUMBER_WIDTH + 2, 3, 2) if LAYER_WIDTH + size * len(heads) <= width), 1)
    numbered = cell > NUMBER_WIDTH
    drawn = Text(no_wrap=True, overflow="crop")
    drawn.append("layer".ljust(LAYER_WIDTH), style="bold")
    drawn.append("".join(_heading(head, cell) for head in heads).rstrip() + "\n", style="bold")
    for layer, row in zip(layers, figures, strict=True):
        drawn.append(str(layer).ljust(LAYER_WIDTH), style="bold")
        for figure in row:
            if is_coloured:
                _append_coloured(drawn, figure, low, high, cell)
                continue
            step = _step(figure, low, high)
            shade = SHADES[step] if step else "–"
            text = f" {short(figure):>{NUMBER_WIDTH}}{shade}" if numbered else (shade * 2)[:cell].rjust(cell)
            drawn.append(text, style=COLOURS[step])
        drawn.append("\n")
    if is_coloured:
        drawn.append(f"{' ' * LAYER_WIDTH} {short(low)} ")
        for column in range(BAR_WIDTH):
            drawn.append(" ", style=f"on {_colour(column / (BAR_WIDTH - 1))}")
        return drawn.append(f" {short(high)}")
    ends = " ".join(f"{SHADES[step]} from {short(low + (high - low) * (step - 1) / 5)}" for step in range(1, 6))
    return drawn.append(f"{' ' * LAYER_WIDTH} {ends} to {short(high)}")


def _append_coloured(drawn: Text, figure: float, low: float, high: float, cell: int) -> None:
    """Appends a cell with its number, or as a block where there is no room for numbers, and a gap where there is."""
    if not math.isfinite(figure):
        drawn.append("–".rjust(cell - 1).ljust(cell) if cell > NUMBER_WIDTH else "–".rjust(cell))
        return
    place = (figure - low) / (high - low) if high > low else 0.0
    text = f"{short(figure):>{NUMBER_WIDTH + 1}}" if cell > NUMBER_WIDTH else " " * min(cell, 2)
    ink = "black" if place > 0.5 else "white"
    if cell == 3:
        drawn.append(" ")
    drawn.append(text, style=f"{ink} on {_colour(place)}")
    if cell > NUMBER_WIDTH:
        drawn.append(" ")


def _colour(place: float) -> str:
    """The colour from 0, the lowest figure, to 1, the highest, between its neighbours in CIVIDIS."""
    index = min(int(place * (len(CIVIDIS) - 1)), len(CIVIDIS) - 2)
    part = place * (len(CIVIDIS) - 1) - index
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in CIVIDIS[index : index + 2]]
    red, green, blue = (round(start + (end - start) * part) for start, end in zip(*ends, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def short(number: float) -> str:
    """A number in at most four characters, or five where it is negative: 0.012, 1.2, 123, 12k."""
    if not math.isfinite(number):
        return "–"
    size = abs(number)
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= 0.9995 * scale:
            return f"{number / scale:.{0 if size >= 9.95 * scale else 1}f}{unit}"
    digits = 0 if size >= 99.5 else 1 if size >= 9.95 else 2
    return f"{number:.{digits}f}"


def _heading(head: int, cell: int) -> str:
    label = str(head) if len(str(head)) <= cell else ""
    return f"{label:>{cell - 1}} " if cell > NUMBER_WIDTH else f"{label:>{cell}}"


def _step(figure: float, low: float, high: float) -> int:
    """The number of the shade, from 1 to 5; 0 for what is no number."""
    if not math.isfinite(figure):
        return 0
    return 1 + min(4, int(5 * (figure - low) / (high - low))) if high > low else 1
