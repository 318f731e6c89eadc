"""Entmax attention: sparse weights without a budget.

Source: Sparse Sequence-to-Sequence Models (arXiv 1905.05702), with α = 1.5.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cda_cli.model.rules.base import AttentionRule


class Entmax(AttentionRule):
    """The weights are entmax 1.5 of scores/ε: max(0, s/(2·ε) − τ)², with the τ for which a row sums to 1."""

    def weights(self, scores: Tensor, budget: Tensor, mask: Tensor) -> Tensor:
        halves = (scores / (2 * self.eps)).masked_fill(~mask, -torch.inf)
        halves = halves - halves.detach().amax(-1, keepdim=True)
        # Newton's method on Σ max(0, x − τ)² = 1, which is convex and falls in τ, stays below the solution if it starts
        # there. With n equal entries x − τ begins √n times too large. A step about halves that factor, and once it is
        # near 1 doubles the digits.
        τ = torch.full_like(halves[..., :1].detach(), -1.0)
        for _ in range(math.ceil(math.log2(halves.shape[-1]) / 2) + 6):
            τ = _newton_step(halves.detach(), τ)
        # The last step has a gradient. It is that of the solution, as the slope is a constant.
        return F.relu(halves - _newton_step(halves, τ)).square()


def _newton_step(x: Tensor, τ: Tensor) -> Tensor:
    excess = F.relu(x - τ)
    slope = 2 * excess.detach().sum(-1, keepdim=True)
    return τ + (excess.square().sum(-1, keepdim=True) - 1) / slope
