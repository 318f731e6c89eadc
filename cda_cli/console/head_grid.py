"""Draws one figure of every head: layers down, heads across, in shades that also read without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.text import Text

from cda_cli.console.heat_map import COLOURS, SHADES

LAYER_WIDTH = 5
NUMBER_WIDTH = 4


def head_grid(layers: Sequence[int], heads: Sequence[int], figures: Sequence[Sequence[float]], width: int) -> Text:
    """Draws figures [layer][head], with their numbers if these fit into `width` columns, and otherwise shades alone.

    Five equal steps from the lowest to the highest figure have a shade each. NaN is a dash.
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
            step = _step(figure, low, high)
            shade = SHADES[step] if step else "–"
            text = f" {short(figure):>{NUMBER_WIDTH}}{shade}" if numbered else (shade * 2)[:cell].rjust(cell)
            drawn.append(text, style=COLOURS[step])
        drawn.append("\n")
    ends = " ".join(f"{SHADES[step]} from {short(low + (high - low) * (step - 1) / 5)}" for step in range(1, 6))
    return drawn.append(f"{' ' * LAYER_WIDTH} {ends} to {short(high)}")


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
