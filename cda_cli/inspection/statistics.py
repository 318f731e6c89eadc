"""Sums of figures over rows, in float64, from which means and quantiles follow.

A block of rows is added and can be forgotten: what is kept does not grow with the text.

Shapes: B batch, H heads, t queries of a block, M figures of a row, P ranges of positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ZERO = torch.zeros((), dtype=torch.float64)  # where a sum begins, whatever its shape and its device

RANGES = 32  # The last begins at 2^30.
STEPS = 64  # of a histogram for each factor of 2, so that a quantile is exact to 0.55 %
LOWEST, HIGHEST = 2.0**-8, 2.0**31  # what a histogram tells apart


def doubling_range(numbers: Tensor) -> Tensor:
    """Returns the index of the range that each whole number is in: 0, 1, 2–3, 4–7, 8–15 and so on."""
    return torch.frexp(numbers.double()).exponent


def range_ends(index: int) -> tuple[int, int]:
    """Returns the first and the last number of a range."""
    return (2 ** (index - 1), 2**index - 1) if index else (0, 0)


class RowMeans:
    """Means of M figures over the rows of each head, and over those in each range of positions. NaN does not count."""

    def __init__(self) -> None:
        self.sums = ZERO  # [M, H, P], once a block was added
        self.counts = ZERO

    def add(self, values: Tensor, position: Tensor) -> None:
        """Adds `values` [M, B, H, t], float64, of the queries at `position` [t]."""
        ranges = torch.arange(RANGES, device=position.device)
        is_in = (doubling_range(position).unsqueeze(1) == ranges).double()
        counted = ~values.isnan()
        self.sums = self.sums + torch.where(counted, values, 0.0).sum(1) @ is_in
        self.counts = self.counts + counted.double().sum(1) @ is_in

    def total(self) -> Tensor:
        """The sum over all rows, [M, H], on the CPU."""
        return self.sums.sum(-1).cpu()

    def mean(self) -> Tensor:
        """The mean over all rows, [M, H], on the CPU; NaN where no row counts."""
        return self.total() / self.counts.sum(-1).cpu()

    def by_position(self) -> Tensor:
        """The means over the rows in each range of positions, [M, H, P], up to the range of the last position."""
        used = int(self.counts.sum((0, 1)).nonzero().max()) + 1
        return (self.sums[..., :used] / self.counts[..., :used]).cpu()


class Histogram:
    """How often a positive figure of a row had which size, for each head: steps of 1.1 %, which 1, 2, 4, 8 … hit.

    With `whole`, the figures are whole numbers, and so are the quantiles.
    """

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.counts = ZERO  # [H, steps]

    def add(self, values: Tensor) -> None:
        """Adds `values` [B, H, t]; one below LOWEST counts as LOWEST."""
        H = values.shape[1]
        steps = (torch.log2(values.clamp(LOWEST, HIGHEST) / LOWEST) * STEPS).round().long()
        size = _step(HIGHEST) + 1
        places = steps + size * torch.arange(H, device=steps.device).view(1, H, 1)
        self.counts = self.counts + places.flatten().bincount(minlength=H * size).view(H, size)

    def quantile(self, share: float) -> Tensor:
        """The figure that a `share` of the rows of each head does not exceed, [H], on the CPU, exact to 0.55 %."""
        below = self.counts.cpu().cumsum(-1)
        steps = (below < (share * below[:, -1:]).clamp(min=1)).sum(-1)
        figures = LOWEST * 2 ** (steps.double() / STEPS)
        return figures.round() if self.whole else figures

    def of_head(self, head: int) -> Histogram:
        """The histogram of one head, on the CPU."""
        return Histogram.joined([self], slice(head, head + 1))

    @classmethod
    def joined(cls, histograms: Sequence[Histogram], heads: slice = slice(None)) -> Histogram:
        """The histogram of the rows of all `histograms`, or of these heads of them, as if they were of one head."""
        joined = cls(histograms[0].whole)
        joined.counts = torch.stack([each.counts[heads].sum(0, keepdim=True).cpu() for each in histograms]).sum(0)
        return joined

    def quantiles(self) -> list[dict[str, float]]:
        """The figures that 5, 50 and 95 % of the rows do not exceed, by "p5", "p50" and "p95", of each head."""
        figures = {f"p{percent}": self.quantile(percent / 100).tolist() for percent in (5, 50, 95)}
        return [dict(zip(figures, each, strict=True)) for each in zip(*figures.values(), strict=True)]

    def share_at(self, value: float) -> Tensor:
        """The share of the rows whose figure is `value`, to half a step, [H], on the CPU."""
        counts = self.counts.cpu()
        return counts[:, _step(value)] / counts.sum(-1)


def _step(value: float) -> int:
    return round(torch.log2(torch.tensor(value, dtype=torch.float64) / LOWEST).item() * STEPS)
