"""Intervals of a mean over a few seeds, and how many seeds a comparison needs, by Student's t distribution."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

LEVEL = 0.95
POWER = 0.8
MOST_SEEDS = 1000


class Mean(NamedTuple):
    """The mean of a number over so many `seeds`, its standard deviation, and the interval of the mean, of level LEVEL.

    Deviation and interval are NaN for fewer than two numbers, and the mean for none.
    """

    value: float
    deviation: float
    low: float
    high: float
    seeds: int

    def as_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        interval = [self.low, self.high]
        return {"mean": self.value, "deviation": self.deviation, "mean_interval": interval, "seeds": self.seeds}


def mean_of(numbers: Sequence[float]) -> Mean:
    """The mean of independent `numbers`: x̄ ± t·s/√n with n − 1 degrees of freedom (Student, Biometrika 6, 1908)."""
    count = len(numbers)
    if count < 2:
        return Mean(numbers[0] if numbers else math.nan, math.nan, math.nan, math.nan, count)
    value, deviation = statistics.fmean(numbers), statistics.stdev(numbers)
    half = quantile((1 + LEVEL) / 2, count - 1) * deviation / math.sqrt(count)
    return Mean(value, deviation, value - half, value + half, count)


def seeds_needed(deviation: float, distance: float) -> int | None:
    """How many pairs tell a true mean difference from one that is `distance` away, by an interval of level LEVEL.

    `deviation` is that of the paired differences. It is the smallest n with n ≥ (t₁₋α + t₁₋β)²·s²/d², of n − 1 degrees
    of freedom, α = (1 − LEVEL)/2 and 1 − β = POWER; None for more than MOST_SEEDS. Source: Chow, Shao and Wang, Sample
    Size Calculations in Clinical Research, 2nd edition, 2008, section 3.1, of which it takes t for normal quantiles, as
    the deviation is estimated.
    """
    normal = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(POWER)
    fewest = (normal * deviation / distance) ** 2  # as t quantiles are larger
    for count in range(max(2, math.ceil(min(fewest, MOST_SEEDS + 1))), MOST_SEEDS + 1):
        quantiles = quantile((1 + LEVEL) / 2, count - 1) + quantile(POWER, count - 1)
        if count >= (quantiles * deviation / distance) ** 2:
            return count
    return None


def quantile(probability: float, freedom: int) -> float:
    """The t that is exceeded with 1 − `probability`, which is at least a half; by bisection."""
    low, high = 0.0, 1.0
    while distribution(high, freedom) < probability:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if distribution(middle, freedom) < probability else (low, middle)
    return low


def distribution(t: float, freedom: int) -> float:
    """The probability of at most `t` ≥ 0, with whole degrees of `freedom`.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, equations 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    cosine2 = math.cos(angle) ** 2
    if freedom == 1:
        return 0.5 + angle / math.pi
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for number in range(2 + odd, freedom - 1, 2):
        term *= cosine2 * (number - 1) / number
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + inside) / 2
