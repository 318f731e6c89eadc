"""The picture of a sweep: the losses of all seeds, and the loss against the keys kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cda_cli.plots import STYLES, Point, Style, add_legend, doubling_axis, draw_line, drawable, new_figure, save, styled
from cda_cli.sweep.result import ArmResult, Result
from cda_cli.sweep.spec import EVALUATED

HEIGHT = 0.4  # of a part, as a share of the width of a page


def draw_sweep(path: Path, result: Result) -> None:
    """Draws a sweep into the file `path`: each seed of each arm, and a curve for each choice of keys that were kept."""
    style = STYLES["paper"]
    with styled(style):
        parts = 1 + len(result.cuts)
        figure, (first, *others) = new_figure(style, 1, HEIGHT * parts, rows=parts)
        _draw_seeds(first, style, result)
        for axes, (choice, numbers) in zip(others, result.cuts.items(), strict=True):
            _draw_cuts(axes, style, result, choice, numbers)
        if others:
            add_legend(figure, others[0], style)
        save(figure, path, title=result.sweep.file.stem, description=result.command)


def _draw_seeds(axes: Any, style: Style, result: Result) -> None:
    """Draws the loss of each seed, and the mean of each arm with its interval."""
    for place, arm in enumerate(result.arms):
        colour, mean, losses = style.colours[place % len(style.colours)], arm.mean("bits_per_byte"), _losses(arm)
        if not losses:
            continue
        axes.plot(losses, [place] * len(losses), "|", color=colour, markersize=8 * style.stroke)
        spread = None if math.isnan(mean.low) else mean.value - mean.low
        axes.errorbar(mean.value, place, xerr=spread, fmt="o", color=colour, markersize=4 * style.stroke, capsize=3)
    axes.set_yticks(range(len(result.arms)), [drawable(arm.name) for arm in result.arms])
    axes.set_ylim(len(result.arms) - 0.5, -0.5)
    axes.set_xlabel("bits per byte of the last validation: seeds, and their mean with its 95 % interval")


def _draw_cuts(axes: Any, style: Style, result: Result, choice: str, numbers: Sequence[int]) -> None:
    """Draws the loss of each arm against the keys kept, with its interval as a band."""
    for place, arm in enumerate(result.arms):
        means = {number: arm.mean(f"{EVALUATED}{choice}[{number}].bits_per_byte") for number in numbers}
        points = [Point(n, mean.value, mean.low, mean.high) for n, mean in means.items() if math.isfinite(mean.value)]
        if points:
            draw_line(axes, style, place, drawable(arm.name), points)
    doubling_axis(axes, numbers)
    axes.set_xlabel(f"keys kept ({choice})")
    axes.set_ylabel("bits per byte")


def _losses(arm: ArmResult) -> list[float]:
    return [loss for run in arm.runs if math.isfinite(loss := run.metric("bits_per_byte"))]
