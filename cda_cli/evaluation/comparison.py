"""Compares several ways of measuring the same text: checkpoints, or changes of one of them.

Shapes: N ways, W windows, U observations, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cda_cli.evaluation.evaluate import Evaluation, summarise
from cda_cli.evaluation.intervals import Bootstrap, Units, influence, influence_error
from cda_cli.evaluation.sums import Sums


class Estimate(NamedTuple):
    """A figure with its standard error, and its bootstrap interval from `low` to `high`; NaN where there is none."""

    value: float
    error: float
    low: float
    high: float

    def as_dict(self, name: str) -> dict[str, Any]:
        """The fields of the figure `name`, as `--json` has them."""
        return {name: self.value, f"{name}_error": self.error, f"{name}_interval": [self.low, self.high]}


class Comparison:
    """The sums of N ways over the same windows, and their figures with errors and paired differences.

    `units` says which windows make an observation: for all ways, or for each of them where windows differ. There is one
    bootstrap for all figures, so each resample has the same observations in every way.
    """

    def __init__(self, ways: Sequence[Sums], units: Units | Sequence[Units]) -> None:
        each = [units] * len(ways) if isinstance(units, Units) else units
        self.units = each[0]
        self.windows = [len(way) for way in ways]
        self.ways = [way.over(its.of_window) for way, its in zip(ways, each, strict=True)]

    @cached_property
    def _bootstrap(self) -> Bootstrap:
        columns = [column for way in self.ways for column in (way.nats, way.tokens, way.text_bytes)]
        return Bootstrap(torch.stack([column.double() for column in columns], 1), self.units.block)

    def evaluation(self, way: int = 0) -> Evaluation:
        """The figures of a way, with standard errors over the observations."""
        return summarise(self.ways[way], self.windows[way])

    def loss(self, way: int = 0) -> Estimate:
        """The mean loss of a way, in nats per token."""
        found = self.evaluation(way)
        interval = self._bootstrap.interval(lambda totals: totals[:, 3 * way] / totals[:, 3 * way + 1])
        return Estimate(found.loss, found.standard_error, *interval)

    def bits_per_byte(self, way: int = 0) -> Estimate:
        """The bits per byte of a way."""
        found = self.evaluation(way)
        return Estimate(
            found.bits_per_byte,
            found.bits_per_byte_error,
            *self._bootstrap.interval(lambda totals: _bits(totals, way)),
        )

    def difference(self, way: int, base: int = 0) -> Estimate:
        """How far the bits per byte of a way are above those of `base`, paired by observation.

        What an observation adds to both leaves no error.
        """
        value = self.evaluation(way).bits_per_byte - self.evaluation(base).bits_per_byte
        influences = [influence(self.ways[one].nats, self.ways[one].text_bytes) for one in (way, base)]
        error = influence_error(influences[0] - influences[1]) / math.log(2)
        interval = self._bootstrap.interval(lambda totals: _bits(totals, way) - _bits(totals, base))
        return Estimate(value, error, *interval)


def _bits(totals: NDArray[np.float64], way: int) -> NDArray[np.float64]:
    """The bits per byte of a way in each resample, [R]."""
    return totals[:, 3 * way] / np.log(2) / totals[:, 3 * way + 2]
