"""Standard errors and bootstrap intervals of ratios of sums, such as nats per token, over observations of a text.

Of shares of independent examples, there is the interval of Wilson.

Tokens of one window share their context, so an observation is a window or more, never a token. Shapes: W windows, U
observations, K columns, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95
FEWEST_DOCUMENTS = 30  # With fewer, windows are the observations.
WINDOWS_OF_STRETCH = 8


@dataclass(frozen=True)
class Units:
    """Which windows make up an observation: `of_window`, int64 [W], counts the observations up from 0.

    `name` is what observations are, such as "documents". The bootstrap resamples `block` consecutive ones together.
    """

    of_window: Tensor
    name: str
    block: int = 1

    @property
    def count(self) -> int:
        """The number of observations."""
        return int(self.of_window[-1]) + 1

    @property
    def blocks(self) -> int:
        """The number of blocks. The last one takes the observations that are left over."""
        return max(1, self.count // self.block)

    @property
    def resampled(self) -> str:
        """What the bootstrap resamples, in words."""
        return self.name if self.block == 1 else f"blocks of {self.block} {self.name}"


def windows_as_units(windows: int, together: int = 1) -> Units:
    """Makes each `together` consecutive windows an observation, and has the bootstrap resample blocks of them.

    Neighbours are about the same thing, so a block is ⌈U^(1/3)⌉ of U observations long, which is the order of length
    that suits an estimate of a variance (Künsch, The Jackknife and the Bootstrap for General Stationary Observations,
    1989).
    """
    of_window = torch.arange(windows) // together
    name = "windows" if together == 1 else f"groups of {together} windows"
    return Units(of_window, name, math.ceil(round((int(of_window[-1]) + 1) ** (1 / 3), 9)))


def stretches_as_units(bytes_of_windows: Sequence[Tensor]) -> list[Units]:
    """Makes stretches of a text observations, of readings of it whose windows differ, as under unlike tokenizers.

    `bytes_of_windows` has the bytes of text of the windows of each reading, int64 [W]. A stretch is as long as
    WINDOWS_OF_STRETCH windows of the reading that has the longest ones. A window belongs to the stretch in which it
    begins, so at its ends a stretch is not the same text in all readings, by less than a window.
    """
    totals = [sizes.sum().clamp(min=1) for sizes in bytes_of_windows]
    longest = max(  # as a share of the text
        max(WINDOWS_OF_STRETCH / len(sizes), (sizes.max() / total).item())
        for sizes, total in zip(bytes_of_windows, totals, strict=True)
    )
    count = max(1, int(1 / longest))
    of_windows = [
        ((sizes.cumsum(0) - sizes) * count // total).clamp(max=count - 1)
        for sizes, total in zip(bytes_of_windows, totals, strict=True)
    ]
    block = math.ceil(round(count ** (1 / 3), 9))
    return [Units(of_window, "stretches of the text", block) for of_window in of_windows]


def ratio_error(sums: Tensor, counts: Tensor) -> float:
    """Returns the standard error of the ratio Σ sums / Σ counts over observations [U].

    It is NaN where only a single observation counts anything. Source: Cochran, Sampling Techniques, equation 6.13.
    """
    observations, total = len(sums), counts.sum()
    if (counts > 0).sum() < 2:
        return math.nan
    residual = sums - sums.sum() / total * counts
    return (math.sqrt(observations / (observations - 1)) * residual.norm() / total).item()


def influence(sums: Tensor, counts: Tensor) -> Tensor:
    """Returns what each observation [U] does to the ratio Σ sums / Σ counts, to first order."""
    total = counts.sum()
    return (sums - sums.sum() / total * counts) / total


def influence_error(influence_U: Tensor) -> float:
    """Returns the standard error of a figure from its influences; those of a difference are the differences.

    Of a ratio it is what `ratio_error` returns. It is NaN for a single observation.
    """
    observations = len(influence_U)
    if observations < 2:
        return math.nan
    return (math.sqrt(observations / (observations - 1)) * influence_U.norm()).item()


class Bootstrap:
    """Resamples observations with replacement, all columns together, so that what is compared stays paired.

    `columns` [U, K] are sums over the observations. The intervals are those of percentiles (Efron and Tibshirani, An
    Introduction to the Bootstrap, 1993, section 13.3), of level LEVEL. They are too narrow for few blocks.
    """

    def __init__(self, columns: Tensor, block: int = 1, resamples: int = RESAMPLES, seed: int = SEED) -> None:
        blocks = max(1, len(columns) // block)
        group = (torch.arange(len(columns)) // block).clamp(max=blocks - 1)
        summed = torch.zeros(blocks, columns.shape[1], dtype=torch.float64).index_add(0, group, columns.double())
        values: NDArray[np.float64] = summed.numpy()
        generator = np.random.default_rng(seed)
        draws = (generator.integers(0, blocks, blocks) for _ in range(resamples if blocks > 1 else 0))
        totals = [np.bincount(drawn, minlength=blocks) @ values for drawn in draws]
        self.totals: NDArray[np.float64] = np.array(totals).reshape(-1, columns.shape[1])

    def interval(self, statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> tuple[float, float]:
        """Returns the interval of `statistic`, which turns the totals [R, K] of the resamples into values [R].

        It is NaN where there is a single block to resample, or a resample for which the statistic does not exist.
        """
        if not len(self.totals):
            return math.nan, math.nan
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = np.quantile(statistic(self.totals), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Returns the interval, of level LEVEL, of a share of `count` independent observations.

    Source: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    """
    z2 = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    margin = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, centre - margin), min(1.0, centre + margin)
