"""The sparsity measures: from weights to figures. Rows sum to k, so each measure says what it normalises by.

Shapes: B batch, H heads, T queries, S keys (null keys first), F feed-forward units.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.model.observe import AttentionSeen

VISIBLE_WEIGHT = 1e-3  # λ above it counts as attended: λ > 0 everywhere, so "sparse" needs a tolerance
CAPPED_WEIGHT = 1 - 1e-6  # λ at or above it counts as capped


def effective_support(weights: Tensor) -> Tensor:
    """exp of the entropy of λ/Σλ along the last dimension, [...]: how many entries share a row; 0 if it is empty."""
    total = weights.sum(-1, keepdim=True)
    share = weights / total.clamp(min=torch.finfo(weights.dtype).tiny)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)


class HeadFigures(NamedTuple):
    """Sums over rows, float64 [H] each, on the device of the weights; divide by `rows` (or by `bounded_rows`, where
    named) for means."""

    rows: Tensor
    row_sum: Tensor
    sparsity_k: Tensor
    excess: Tensor  # |Σλ − min(k, visible keys)|
    support: Tensor
    attended: Tensor  # entries with λ > VISIBLE_WEIGHT
    bounded_rows: Tensor  # rows that see more than k keys: elsewhere every entry is capped, whatever the model does
    capped_share: Tensor  # capped entries per unit of k, over the bounded rows
    distance: Tensor  # mean of query position − key position under λ/Σλ, null keys left out

    def __add__(self, other: object) -> HeadFigures:
        assert isinstance(other, HeadFigures)
        return HeadFigures(*(a + b for a, b in zip(self, other, strict=True)))


def head_figures(seen: AttentionSeen) -> HeadFigures:
    """The figures of one layer's heads over some rows of one forward pass."""
    weights, k = seen.weights.double(), seen.sparsity_k.double()
    B, H, T, S = weights.shape
    keys = torch.arange(S - seen.null, device=weights.device)
    position = seen.position + torch.arange(T, device=weights.device)
    visible = (position + 1 + seen.null).expand(B, H, T)
    row_sum = weights.sum(-1)
    bounded = visible > k
    capped = (weights >= CAPPED_WEIGHT).sum(-1) / k
    real = weights[..., seen.null :]
    back = (position.unsqueeze(1) - keys).clamp(min=0).double()
    distance = (real * back).sum(-1) / real.sum(-1).clamp(min=1e-30)

    def total(values: Tensor) -> Tensor:
        return values.double().sum((0, 2))

    return HeadFigures(
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


class UnitFigures(NamedTuple):
    """The number of tokens, and for each unit of [F] of how many of them it was active on."""

    tokens: int
    times_active: Tensor

    def __add__(self, other: object) -> UnitFigures:
        assert isinstance(other, UnitFigures)
        return UnitFigures(self.tokens + other.tokens, self.times_active + other.times_active)


def unit_figures(activations: Tensor) -> UnitFigures:
    """The figures of one feed-forward layer, from its activations [B, T, F]; active means |activation| > 1e-3."""
    active = activations.abs().flatten(0, 1) > VISIBLE_WEIGHT
    return UnitFigures(len(active), active.sum(0))
