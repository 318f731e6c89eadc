"""Entmax attention: sparse weights without a budget.

Source: Sparse Sequence-to-Sequence Models (arXiv 1905.05702), with α = 1.5.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cda_cli.model.rules.base import AttentionRule

# Rows of up to 65,536 scores, of many shapes and scales, needed at most 8 for 1e-9. Each is a pass over the row.
NEWTON_STEPS = 10


class Entmax(AttentionRule):
    """The weights are entmax 1.5 of scores/ε: max(0, s/(2·ε) − τ)², with the τ for which a row sums to 1."""

    def weights(self, scores: Tensor, budget: Tensor, mask: Tensor) -> Tensor:
        halves = (scores / (2 * self.eps)).masked_fill(~mask, -torch.inf)
        halves = halves - halves.detach().amax(-1, keepdim=True)
        # Newton's method on the norm of max(0, x − τ), which is convex, falls with τ and is nearly straight within the
        # support: from a τ that is too low no step goes too far.
        τ = torch.full_like(halves[..., :1].detach(), -1.0)
        for _ in range(NEWTON_STEPS):
            excess = F.relu(halves.detach() - τ)
            squares = excess.square().sum(-1, keepdim=True)
            τ = τ + (squares - squares.sqrt()) / excess.sum(-1, keepdim=True)
        # One more step, on the square of the norm, has a gradient, which is that of the solution.
        excess = F.relu(halves - τ)
        slope = 2 * excess.detach().sum(-1, keepdim=True)
        τ = τ + (excess.square().sum(-1, keepdim=True) - 1) / slope
        return F.relu(halves - τ).square()
