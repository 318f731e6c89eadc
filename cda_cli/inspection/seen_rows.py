"""Rows of attention weights, with what several measures need of them.

Shapes: B batch, H heads, t queries of a block, S keys (null keys first), R keys that are no null keys, D head width.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from cda_cli.model.observe import ObservedAttention

FEW, ENOUGH = 256, 0.95  # To find a few keys takes much less time than to sort them all.
CAPPED_WEIGHT = 1 - 1e-6  # an entry whose λ is at least this counts as capped


def shares(weights: Tensor) -> Tensor:
    """Returns p = λ/Σλ along the last dimension of `weights` [..., S], in their dtype; 0 for a row of zeros."""
    total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    return weights / total.clamp(min=torch.finfo(weights.dtype).tiny).to(weights.dtype)


class SeenRows:
    """A block of rows of one layer. Single entries have the dtype of the weights, and figures of rows are float64.

    `tokens` [B, R] are the tokens that the keys stand for. Only the patterns of tokens need them.
    """

    def __init__(self, seen: ObservedAttention, tokens: Tensor | None = None) -> None:
        self.seen = seen
        self.tokens = tokens
        self.weights = seen.weights  # λ [B, H, t, S]
        self.k = seen.sparsity_k.double()  # [B, H, t]
        rows = torch.arange(self.k.shape[2], device=self.k.device)
        self.position = seen.position + seen.apart * rows  # of each query, [t]

    @cached_property
    def real_keys(self) -> Tensor:
        """The number of keys that each query sees, without null keys, float64 [t]."""
        if self.seen.visible is None:
            return (self.position + 1).double()
        return self.visible.sum(-1).double()

    @cached_property
    def visible(self) -> Tensor:
        """Which keys each query sees, without null keys, bool [t, R]."""
        if self.seen.visible is not None:
            return self.seen.visible[:, self.seen.null_keys :]
        R = self.weights.shape[-1] - self.seen.null_keys
        return self.position.unsqueeze(1) >= torch.arange(R, device=self.position.device)

    @cached_property
    def distance(self) -> Tensor:
        """How far each query is from each key that is no null key, [t, R]; negative where the query does not see it."""
        R = self.weights.shape[-1] - self.seen.null_keys
        distance = self.position.unsqueeze(1) - torch.arange(R, device=self.position.device)
        return distance if self.seen.visible is None else distance.masked_fill(~self.visible, -1)

    @cached_property
    def bounded(self) -> Tensor:
        """Whether a row sees more than k keys, bool [B, H, t]. Any other row caps every entry, whatever the model."""
        return self.real_keys + self.seen.null_keys > self.k

    def of_bounded(self, figures: Tensor) -> Tensor:
        """Returns `figures` [B, H, t], with NaN for the rows that are not bounded."""
        return torch.where(self.bounded, figures, torch.nan)

    @cached_property
    def row_sum(self) -> Tensor:
        """Σλ, [B, H, t]."""
        return self.weights.sum(-1, dtype=torch.float64)

    @cached_property
    def capped(self) -> Tensor:
        """The number m of capped entries, [B, H, t]."""
        return (self.weights >= CAPPED_WEIGHT).sum(-1).double()

    @cached_property
    def share(self) -> Tensor:
        """p = λ/Σλ, [B, H, t, S]."""
        return shares(self.weights)

    @cached_property
    def real_share(self) -> Tensor:
        """p of the keys that are no null keys, [B, H, t, R]; a row sums to 1 or less."""
        return self.share[..., self.seen.null_keys :]

    @cached_property
    def real_mass(self) -> Tensor:
        """The sum of `real_share`, [B, H, t]."""
        return self.real_share.sum(-1, dtype=torch.float64)

    @cached_property
    def entropy(self) -> Tensor:
        """−Σ p ln p, in nats, [B, H, t]."""
        return -torch.special.xlogy(self.share, self.share).sum(-1, dtype=torch.float64)

    @cached_property
    def mass_of_largest(self) -> Tensor:
        """The sum of the n largest p of each row at index n − 1, [B, H, t, N].

        N is FEW where so many keys hold ENOUGH of every row, and S elsewhere.
        """
        S = self.share.shape[-1]
        if S > FEW:
            few = self.share.topk(FEW).values.cumsum(-1, dtype=torch.float64)
            if (few[..., -1] >= ENOUGH).all():
                return few
        return self.share.sort(-1, descending=True).values.cumsum(-1, dtype=torch.float64)
