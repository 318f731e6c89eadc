"""The sparsity measures of weights and activations. Rows sum to k, so each measure says what it normalises by.

Shapes: B batch, H heads, T queries, S keys (null keys first), F feed-forward units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.model.observe import ObservedAttention

VISIBLE_WEIGHT = 1e-3  # an entry with a larger λ counts as attended; λ > 0 everywhere, so "sparse" needs a tolerance
CAPPED_WEIGHT = 1 - 1e-6  # an entry whose λ is at least this counts as capped


def effective_support(weights: Tensor) -> Tensor:
    """Counts the entries that share a row: exp of the entropy of λ/Σλ along the last dimension of `weights` [..., S].

    Returns [...]; a row of zeros has 0.
    """
    total = weights.sum(-1, keepdim=True)
    share = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)


class HeadSums(NamedTuple):
    """Sums of the measures over the rows of each head, float64 [H], on the device of the weights.

    The mean of a measure is its sum divided by `rows`; that of `capped_share` is divided by `bounded_rows`.
    """

    rows: Tensor  # their number
    row_sum: Tensor
    sparsity_k: Tensor
    excess: Tensor  # |Σλ − min(k, visible keys)|
    support: Tensor
    attended: Tensor  # entries with λ > VISIBLE_WEIGHT
    bounded_rows: Tensor  # the number of rows that see more than k keys; any other row must cap every entry
    capped_share: Tensor  # capped entries per unit of k, over the bounded rows
    distance: Tensor  # mean of query position − key position under λ/Σλ, without null keys

    def __add__(self, other: object) -> HeadSums:
        assert isinstance(other, HeadSums)
        return HeadSums(*(a + b for a, b in zip(self, other, strict=True)))


def sum_head_measures(seen: ObservedAttention) -> HeadSums:
    """Sums the measures of each head of one layer over some rows of a forward pass."""
    weights, k = seen.weights.double(), seen.sparsity_k.double()
    B, H, T, S = weights.shape
    keys = torch.arange(S - seen.null_keys, device=weights.device)
    position = seen.position + torch.arange(T, device=weights.device)
    visible = (position + 1 + seen.null_keys).expand(B, H, T)
    row_sum = weights.sum(-1)
    bounded = visible > k
    capped = (weights >= CAPPED_WEIGHT).sum(-1) / k
    real = weights[..., seen.null_keys :]
    back = (position.unsqueeze(1) - keys).clamp(min=0).double()
    distance = (real * back).sum(-1) / real.sum(-1).clamp(min=1e-30)

    def total(values: Tensor) -> Tensor:
        return values.double().sum((0, 2))

    return HeadSums(
        rows=total(torch.ones_like(k)),
        row_sum=total(row_sum),
        sparsity_k=total(k),
        excess=total((row_sum - torch.minimum(k, visible.double())).abs()),
        support=total(effective_support(weights)),
        attended=total((weights > VISIBLE_WEIGHT).sum(-1)),
        bounded_rows=total(bounded),
        capped_share=total(capped * bounded),
        distance=total(distance),
    )


class UnitCounts(NamedTuple):
    """The number of tokens, and the number of them on which each unit was active, [F]."""

    tokens: int
    times_active: Tensor

    def __add__(self, other: object) -> UnitCounts:
        assert isinstance(other, UnitCounts)
        return UnitCounts(self.tokens + other.tokens, self.times_active + other.times_active)


def count_active_units(activations: Tensor) -> UnitCounts:
    """Counts on how many tokens each unit is active, from activations [B, T, F]: |activation| > VISIBLE_WEIGHT."""
    active = activations.abs().flatten(0, 1) > VISIBLE_WEIGHT
    return UnitCounts(len(active), active.sum(0))
