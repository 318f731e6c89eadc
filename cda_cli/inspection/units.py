"""Measures of the feed-forward: how few units make its output, which never do, and whether neighbours share them.

Shapes: B batch, T positions, F units, C width of the residual stream.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.inspection.statistics import ZERO, Histogram
from cda_cli.model.observe import ObservedFeedForward

OUTPUT = 0.99  # of what a token's units contribute: the fewest units that hold it are the units in use
ROUNDING = 1e-6  # of a sum of float32
ENTRIES = 2**24  # activations that are sorted at a time

ACTIVE = 1e-3  # |activation| from which the records of training call a unit active (docs/metrics.md)


def contributions(activations: Tensor, to_out: Tensor) -> Tensor:
    """|a_f| ‖W_out[:, f]‖, float32 [B, T, F]: the length of what each unit adds to the residual stream.

    An activation alone has no scale: halved, with its column of W_out doubled, it does the same. TEAL (arXiv
    2408.14690) cuts by |a| and takes a threshold for each matrix.
    """
    return activations.float().abs() * to_out.float().norm(dim=0)


def units_in_use(contributions: Tensor) -> Tensor:
    """The fewest units of each token that hold OUTPUT of its contributions, bool [..., F].

    By the triangle inequality, what the others add is at most 1 − OUTPUT of the sum of all lengths.
    """
    largest, order = contributions.sort(-1, descending=True)
    before = largest.cumsum(-1, dtype=torch.float64) - largest
    needed = (before < (OUTPUT - ROUNDING) * contributions.sum(-1, keepdim=True, dtype=torch.float64)) & (largest > 0)
    return torch.zeros_like(needed).scatter(-1, order, needed)


class UnitFigures(NamedTuple):
    """One feed-forward layer. A unit is in use on a token by `units_in_use`.

    `units_99` is the mean number of units in use, and `units_99_p95` what 95 % of the tokens do not exceed. A dead unit
    is in use on no token, and one that is always on is on every token. `neighbour_overlap` is the mean of |A ∩ B| over
    the mean of |A ∪ B| for the units of neighbouring tokens, and `chance_overlap` the same for tokens without order.

    `nonzero_units` is the mean number of units that are not 0 on a token. Where a router chooses among `blocks` of
    units (0 without one), a block is active on a token that it is chosen for, and is then computed, even if all its
    units are 0: `active_blocks` is the mean number of these, and a dead block is active on no token.
    """

    units: int
    units_99: float
    units_99_p95: float
    dead_units: int
    always_on_units: int
    neighbour_overlap: float
    chance_overlap: float
    nonzero_units: float
    blocks: int
    active_blocks: float
    dead_blocks: int


class UnitCensus:
    """Counts over tokens, from which the figures of one layer follow."""

    def __init__(self) -> None:
        self.tokens = self.pairs = 0
        self.times = ZERO  # tokens on which each unit is in use, [F]
        self.both = ZERO  # units in use on both tokens, over all pairs of neighbours
        self.either = ZERO
        self.numbers = Histogram(whole=True)
        self.nonzero = ZERO  # tokens on which each unit is not 0, [F]
        self.active = ZERO  # tokens for which each block is chosen; without a router none

    def add(self, seen: ObservedFeedForward) -> None:
        B, T, F = seen.activations.shape
        before: Tensor | None = None  # the units of the last token of the chunk before
        for chunk in seen.activations.split(max(1, ENTRIES // (B * F)), 1):
            used = units_in_use(contributions(chunk, seen.to_out))
            self.times = self.times + used.sum((0, 1)).double()
            self.numbers.add(used.sum(-1).double().unsqueeze(1))
            followed = used if before is None else torch.cat((before, used), 1)
            self.both = self.both + (followed[:, 1:] & followed[:, :-1]).sum().double()
            self.either = self.either + (followed[:, 1:] | followed[:, :-1]).sum().double()
            before = used[:, -1:]
            self.nonzero = self.nonzero + (chunk != 0).sum((0, 1)).double()
        if seen.chosen is not None:
            self.active = self.active + seen.chosen.sum((0, 1)).double()
        self.tokens += B * T
        self.pairs += B * (T - 1)

    def frequency(self) -> list[float]:
        """The share of the tokens on which each unit is in use, [F]; empty without a token."""
        frequency: list[float] = (self.times.cpu() / self.tokens).tolist() if self.tokens else []
        return frequency

    def figures(self) -> UnitFigures:
        """What was counted; without a token there are no units, and no means."""
        if not self.tokens:
            return UnitFigures(0, math.nan, math.nan, 0, 0, math.nan, math.nan, math.nan, 0, math.nan, 0)
        rate = self.times.cpu() / self.tokens
        mean, shared = rate.sum().item(), rate.square().sum().item()
        return UnitFigures(
            units=len(rate),
            units_99=mean,
            units_99_p95=self.numbers.quantile(0.95).item(),
            dead_units=int((self.times == 0).sum()),
            always_on_units=int((self.times == self.tokens).sum()),
            neighbour_overlap=float(self.both / self.either) if self.pairs else math.nan,
            chance_overlap=shared / (2 * mean - shared) if mean else math.nan,
            nonzero_units=self.nonzero.sum().item() / self.tokens,
            blocks=self.active.numel() if self.active.ndim else 0,
            active_blocks=self.active.sum().item() / self.tokens,
            dead_blocks=int((self.active == 0).sum()) if self.active.ndim else 0,
        )


def count_active(activations: Tensor) -> Tensor:
    """The mean number of units with |activation| > ACTIVE on a token, for the records of training: [], float64."""
    return (activations.abs() > ACTIVE).sum(-1).double().mean()
