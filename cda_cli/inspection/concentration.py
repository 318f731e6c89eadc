"""Measures of how few keys share the mass of a row, p = λ/Σλ, whatever the row sums to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cda_cli.inspection.seen_rows import ENOUGH, SeenRows, shares

ROUNDING = 1e-6  # of a sum of float32 shares: a row that holds a mass up to it holds it


def effective_support(weights: Tensor) -> Tensor:
    """exp(−Σ p ln p), the number of equal entries that have the same entropy; p = λ/Σλ.

    `weights` are [..., S]. Returns [...]; a row of zeros has 0. Zhai et al. (arXiv 2303.06296) take the entropy itself.
    """
    share = shares(weights)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return torch.where(weights.sum(-1) > 0, entropy.exp(), 0.0)


def support(rows: SeenRows) -> Tensor:
    """`effective_support` of each row, [B, H, t]."""
    return torch.where(rows.row_sum > 0, rows.entropy.exp(), 0.0)


def participation(rows: SeenRows) -> Tensor:
    """1/Σp², the participation ratio, [B, H, t]: at most the effective support; rare small entries hardly count."""
    squares = rows.share.square().sum(-1, dtype=torch.float64)
    return torch.where(rows.row_sum > 0, 1 / squares.clamp(min=1e-30), 0.0)


def keys_95(rows: SeenRows) -> Tensor:
    """The smallest number of keys that hold 95 % of the mass of a row, [B, H, t]."""
    return (rows.mass_of_largest < ENOUGH - ROUNDING).sum(-1).double() + 1


def rest_after(keys: int) -> Callable[[SeenRows], Tensor]:
    """Returns R_N = 1 − Σ of the N largest p, for N = `keys`: the mass that a cut to N keys would drop, [B, H, t]."""

    def rest(rows: SeenRows) -> Tensor:
        mass = rows.mass_of_largest
        return (1 - mass[..., min(keys, mass.shape[-1]) - 1]).clamp(min=0)

    return rest
