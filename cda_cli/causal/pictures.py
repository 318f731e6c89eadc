"""The picture of cuts: loss against keys kept, each choice a line with its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cda_cli.causal.effects import Effects
from cda_cli.plots import Point, plot_lines
from cda_cli.scales import LINEAR_BELOW


def curve_points(effects: Effects) -> dict[str, list[Point]]:
    """The bits per byte that each cut of keys adds, against the keys kept, by the choice of them."""
    curves: dict[str, list[Point]] = {}
    for series, curve in effects.curves().items():
        points = [(keys, effect.difference) for keys, effect in curve.items()]
        curves[series] = [Point(keys, value, low, high) for keys, (value, _, low, high) in points]
    return curves


def draw_cuts(path: Path, effects: Sequence[Effects]) -> None:
    """Draws the differences of all cuts of keys, of one or several checkpoints, into the file `path`."""
    lines: dict[str, list[Point]] = {}
    for number, of_checkpoint in enumerate(effects, start=1):
        of = f", checkpoint {number}" if len(effects) > 1 else ""
        lines |= {series + of: points for series, points in curve_points(of_checkpoint).items()}
    y_label = "bits per byte more than with all keys"
    plot_lines(path, lines, "keys kept for each query", y_label, zero="all keys", linear_below=LINEAR_BELOW)
