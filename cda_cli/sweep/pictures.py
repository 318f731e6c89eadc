"""The picture of a sweep: the losses of all seeds, the loss against the keys kept, and the exact match by length."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cda_cli.plots import STYLES, Point, Style, add_legend, doubling_axis, draw_line, drawable, new_figure, save, styled
from cda_cli.sweep.result import Curve, Result

HEIGHT = 0.4  # of a part, as a share of the width of a page


def draw_sweep(path: Path, result: Result) -> None:
    """Draws a sweep into the file `path`: each seed of each arm, and the curves of the evaluations."""
    style = STYLES["paper"]
    with styled(style):
        parts = 1 + len(result.curves)
        figure, (first, *others) = new_figure(style, 1, HEIGHT * parts, rows=parts)
        _draw_seeds(first, style, result)
        for axes, curve in zip(others, result.curves, strict=True):
            _draw_curve(axes, style, result, curve)
        if others:
            add_legend(figure, others[0], style)
        save(figure, path, title=result.sweep.file.stem, description=result.command)


def _draw_seeds(axes: Any, style: Style, result: Result) -> None:
    """Draws the loss of each seed, and the mean of each arm with its interval."""
    metric, unit, _ = result.measure
    for place, arm in enumerate(result.arms):
        losses = [loss for run in arm.runs if math.isfinite(loss := run.metric(metric))]
        colour, mean = style.colours[place % len(style.colours)], arm.mean(metric)
        if not losses:
            continue
        axes.plot(losses, [place] * len(losses), "|", color=colour, markersize=8 * style.stroke)
        spread = None if math.isnan(mean.low) else mean.value - mean.low
        axes.errorbar(mean.value, place, xerr=spread, fmt="o", color=colour, markersize=4 * style.stroke, capsize=3)
    axes.set_yticks(range(len(result.arms)), [drawable(arm.name) for arm in result.arms])
    axes.set_ylim(len(result.arms) - 0.5, -0.5)
    axes.set_xlabel(f"{unit} of the last validation: seeds, and their mean with its 95 % interval")


def _draw_curve(axes: Any, style: Style, result: Result, curve: Curve) -> None:
    """Draws what the evaluations of each arm gave, with its interval as a band."""
    for place, arm in enumerate(result.arms):
        means = {number: arm.mean(name) for number, name in curve.metrics.items()}
        points = [Point(n, mean.value, mean.low, mean.high) for n, mean in means.items() if math.isfinite(mean.value)]
        if points:
            draw_line(axes, style, place, drawable(arm.name), points)
    doubling_axis(axes, list(curve.metrics))
    axes.set_xlabel(curve.axis)
    axes.set_ylabel(curve.value)
