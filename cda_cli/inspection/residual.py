"""Measures of the residual stream between blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from cda_cli.inspection.statistics import ZERO
from cda_cli.model import Transformer

LARGE, TIMES_MEDIAN = 100, 1000


def massive_activations(x: Tensor) -> Tensor:
    """Which entries of the residual stream x [B, T, C] are massive: |x| > 100 and > 1000 × the median of its window.

    The criterion of Sun et al., arXiv 2402.17762. Returns bool [B, T, C].
    """
    size = x.abs().float()
    return (size > LARGE) & (size > TIMES_MEDIAN * _medians(size).view(-1, 1, 1))


def _medians(size: Tensor) -> Tensor:
    return size.flatten(1).median(-1).values


class ResidualFigures(NamedTuple):
    """The output of one block: massive activations for each window, their channels, the largest |x|, and it against
    the median of |x| in its window."""

    massive_activations: float
    massive_channels: list[int]
    largest_activation: float
    largest_over_median: float


class ResidualStream:
    """Counts over windows, from which the figures of the output of one block follow."""

    def __init__(self) -> None:
        self.windows = 0
        self.massive = ZERO  # their number in each channel, [C]
        self.largest = self.over_median = ZERO

    def add(self, x: Tensor) -> None:
        size = x.abs().float()
        largest = size.amax((1, 2))
        self.windows += len(x)
        self.massive = self.massive + massive_activations(x).sum((0, 1)).double()
        self.largest = self.largest.maximum(largest.max())
        self.over_median = self.over_median.maximum((largest / _medians(size)).max())

    def figures(self) -> ResidualFigures:
        """What was counted; NaN without a window."""
        if not self.windows:
            return ResidualFigures(math.nan, [], math.nan, math.nan)
        channels = self.massive.nonzero().flatten().tolist()
        number = self.massive.sum().item() / self.windows
        return ResidualFigures(number, channels, self.largest.item(), self.over_median.item())


@contextmanager
def watching_residual(model: Transformer, watch: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within it, each forward pass gives `watch` the output [B, T, C] of each block, under the number of the layer."""
    hooks = [
        block.register_forward_hook(lambda module, inputs, output, layer=layer: watch(layer, output.detach()))
        for layer, block in enumerate(model.each_block())
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
