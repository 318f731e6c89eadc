"""The picture of cuts: loss against keys kept, each choice a line with its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cda_cli.causal.effects import Effects
from cda_cli.plots import Point, plot_lines

LINEAR_BELOW = 0.01  # bits per byte: differences that are smaller keep their sign, and their noise stays small


def draw_cuts(path: Path, effects: Sequence[Effects]) -> None:
    """Draws the differences of all cuts of keys, of one or several checkpoints, into the file `path`."""
    lines: dict[str, list[Point]] = {}
    for number, of_checkpoint in enumerate(effects, start=1):
        of = f", checkpoint {number}" if len(effects) > 1 else ""
        for series, curve in of_checkpoint.curves().items():
            points = [(keys, effect.difference) for keys, effect in curve.items()]
            lines[series + of] = [Point(keys, value, low, high) for keys, (value, _, low, high) in points]
    y_label = "bits per byte more than with all keys"
    plot_lines(path, lines, "keys kept for each query", y_label, zero="all keys", linear_below=LINEAR_BELOW)
