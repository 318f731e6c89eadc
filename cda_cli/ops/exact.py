"""The exact solver in PyTorch: Newton's method on F(y) = Σ min(1, y·exp(s_i/ε)) = k, y = exp(a/ε).

F is piecewise linear, concave and increasing, so "fix the capped set, solve for a, cap what exceeds 1, repeat" is
Newton's method; from nothing capped it approaches from the left and ends after finitely many steps. With the capped
set fixed the free weights are (k − m)·softmax, so a step is one softmax, and only the rows whose largest weight
exceeds 1 take another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cda_cli.ops.dual import FAR, Dual, usable


def solve_exact(scores: Tensor, budget: Tensor, visible: Tensor, eps: float) -> tuple[Tensor, Dual]:
    """Weights [R, n] and the dual of the optimum.

    scores [R, n] float32 or float64, masked entries lowest finite or −inf, not all of a row −inf; budget [R], the k
    of each row; visible [R], its number of entries that are not masked. Memory: a copy of the scores, and a few of
    the rows that have capped entries.
    """
    budget = usable(budget)
    weights, shift, peak = _free_part(scores, budget, eps)
    dual = Dual(shift, peak)
    full = visible <= budget
    peak.masked_fill_(full, 1.0)

    rows = torch.nonzero(peak > 1).squeeze(-1)
    free_scores, mass, newest = (tensor.index_select(0, rows) for tensor in (scores, budget, weights))
    capped = torch.zeros_like(newest)
    while len(rows):
        newly = torch.threshold(newest, 1.0, 0.0).clamp_(max=1.0)
        # Always fewer than `mass` in exact arithmetic. Rounding alone can break that, and only where the entries above
        # 1 are all 1 to rounding: nothing more is capped there, and the largest weight is 1.
        newly.mul_((newly.sum(-1) < mass).unsqueeze(-1))
        count = newly.sum(-1)
        capped += newly
        mass -= count
        newest, shift, peak = _free_part(free_scores.sub_(newly, alpha=FAR), mass, eps)
        dual.shift[rows], dual.peak[rows] = shift, peak.clamp(max=1.0)
        weights.index_copy_(0, rows, newest.clamp(max=1.0).add_(capped))
        again = torch.nonzero((peak > 1) & (count > 0)).squeeze(-1)
        rows, free_scores, mass, newest, capped = (
            tensor.index_select(0, again) for tensor in (rows, free_scores, mass, newest, capped)
        )

    everything = torch.nonzero(full).squeeze(-1)
    dual.shift[everything] = torch.finfo(scores.dtype).min
    of_everything = scores[everything]
    visible_or_nan = (of_everything > torch.finfo(scores.dtype).min).to(scores.dtype)
    weights[everything] = torch.where(of_everything.isnan(), torch.nan, visible_or_nan)
    return weights, dual


def _free_part(free_scores: Tensor, mass: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """mass·softmax(scores/ε) [R, n], the largest score [R] and its weight [R]."""
    shift = free_scores.amax(-1)
    logits = free_scores if eps == 1.0 else (free_scores - shift.unsqueeze(-1)).div_(eps)
    weights = logits.softmax(-1).mul_(mass.unsqueeze(-1))
    return weights, shift, weights.amax(-1)
