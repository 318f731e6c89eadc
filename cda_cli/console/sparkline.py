"""A curve in one line of text: a loss over the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cda_cli.console.base import can_show

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.-~=+*#"  # where stdout cannot show blocks
GAP = " "


def sparkline(values: Sequence[float], width: int) -> str:
    """One character for each value, from the lowest to the highest, in at most `width` characters.

    More values than characters are averaged in `width` groups of neighbours. A group without a finite value is a gap.
    The highest tenth of the characters share the top level: the losses of the first steps would otherwise leave the
    others no height.
    """
    groups = min(width, len(values))
    means = [_mean(values[i * len(values) // groups : (i + 1) * len(values) // groups]) for i in range(groups)]
    finite = sorted(mean for mean in means if mean is not None)
    if not finite:
        return GAP * groups
    low, high = finite[0], finite[math.ceil(0.9 * (len(finite) - 1))]
    levels = BLOCKS if can_show(BLOCKS) else ASCII
    return "".join(GAP if mean is None else levels[_level(mean, low, high)] for mean in means)


def _mean(group: Sequence[float]) -> float | None:
    finite = [value for value in group if math.isfinite(value)]
    # Dividing first keeps the sum of huge values finite.
    return sum(value / len(finite) for value in finite) if finite else None


def _level(value: float, low: float, high: float) -> int:
    """A curve without a slope is drawn at the bottom."""
    if value >= high > low:
        return len(BLOCKS) - 1
    if low == high:
        return 0
    # Halved, so that the range of the largest floats stays finite.
    share = (value / 2 - low / 2) / (high / 2 - low / 2)
    return min(len(BLOCKS) - 1, int(share * len(BLOCKS)))
