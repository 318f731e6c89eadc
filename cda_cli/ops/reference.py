"""The specification: the float64 optimum by bisection, independent of both solvers. It is slow, and for checks only.

λ = argmax ⟨s, λ⟩ − ε Σ λ log λ   subject to   0 ≤ λ ≤ 1, Σ λ = k
λ_i = min(1, exp((s_i + a)/ε)),   Σ λ_i = k
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """Weights λ [..., n] and the threshold a [...] in float64, and which entries are capped [..., n] (bool)."""

    weights: Tensor
    threshold: Tensor
    capped: Tensor


def reference_soft_topk(scores: Tensor, sparsity_k: float | Tensor, eps: float, mask: Tensor | None = None) -> Solution:
    """The optimum for `scores` [..., n], computed in float64 whatever their dtype; mask True = visible.

    Rows with no more visible entries than k have λ = 1 there (the limit of the problem, which has no interior
    solution); their threshold is +inf.
    """
    scores = scores.detach().double()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    budget = torch.as_tensor(sparsity_k, dtype=torch.float64, device=scores.device).expand(scores.shape[:-1])
    visible = scores > -torch.inf
    full = visible.sum(-1) <= budget
    top = scores.amax(-1).nan_to_num(neginf=0.0)
    relative = (scores - top.unsqueeze(-1)) / eps
    # In units of ε and relative to the largest score, a lies between log(k/n) (all equal, nothing capped) and the
    # distance down to the smallest visible score (all capped).
    low = budget.log() - torch.log(visible.sum(-1).clamp(min=1).double())
    high = -relative.masked_fill(~visible, 0.0).amin(-1) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        mass = (relative + middle.unsqueeze(-1)).clamp(max=0).exp().sum(-1)
        before = low, high
        low, high = torch.where(mass < budget, middle, low), torch.where(mass < budget, high, middle)
        if torch.equal(low, before[0]) and torch.equal(high, before[1]):
            break  # no number lies between them
    exponent = relative + ((low + high) / 2).unsqueeze(-1)
    weights = exponent.clamp(max=0).exp()
    weights = torch.where(full.unsqueeze(-1), visible.double(), weights)
    threshold = torch.where(full, torch.inf, eps * (low + high) / 2 - top)
    capped = torch.where(full.unsqueeze(-1), visible, _capped(relative, exponent, budget))
    return Solution(weights, threshold, capped)


def reference_gradients(
    solution: Solution, sparsity_k: float | Tensor, eps: float, grad_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """(∂L/∂s [..., n], ∂L/∂k [...]) in float64, by the implicit function theorem on the free entries U.

    δ = Σ_U λ g / (k − m),  ∂L/∂s = (λ/ε)(g − δ) on U, ∂L/∂k = δ; both 0 where nothing is free.
    """
    grad = grad_weights.double()
    free_weights = solution.weights.masked_fill(solution.capped, 0.0)
    m = solution.capped.sum(-1)
    interior = torch.isfinite(solution.threshold)
    budget = torch.as_tensor(sparsity_k, dtype=torch.float64, device=grad.device).expand(m.shape)
    delta = torch.where(interior, (free_weights * grad).sum(-1) / torch.where(interior, budget - m, 1.0), 0.0)
    return free_weights / eps * (grad - delta.unsqueeze(-1)), delta


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, sparsity_k: float | Tensor, eps: float, scale: float, causal: bool
) -> tuple[Tensor, Solution]:
    """Dense float64 attention for query [B,H,T,D], key and value [B,H,S,D]; query t sees keys up to t + S − T."""
    query, key, value = query.double(), key.double(), value.double()
    scores = scale * query @ key.transpose(-1, -2)
    T, S = scores.shape[-2:]
    mask = torch.ones(T, S, dtype=torch.bool, device=scores.device).tril(S - T) if causal else None
    solution = reference_soft_topk(scores, sparsity_k, eps, mask)
    return solution.weights @ value, solution


def _capped(relative: Tensor, exponent: Tensor, budget: Tensor) -> Tensor:
    """Entries with s + a ≥ 0, held to fewer than k of them without ever parting equal scores.

    With an integer k and a small ε the k-th entry is 1 minus less than a rounding, which s + a ≥ 0 cannot tell from 1.
    """
    ordered, order = relative.sort(-1, descending=True)
    rank = torch.arange(1, relative.shape[-1] + 1, device=relative.device)
    next_lower = torch.cat((ordered[..., 1:], torch.full_like(ordered[..., :1], -torch.inf)), -1)
    ends_a_group = (ordered > next_lower) & (rank < budget.unsqueeze(-1))
    last_allowed = (rank * ends_a_group).amax(-1, keepdim=True)
    reached = exponent.gather(-1, order) >= 0
    m = torch.minimum(reached.sum(-1, keepdim=True), last_allowed)
    m = (rank * (ends_a_group & (rank <= m))).amax(-1, keepdim=True)
    return torch.zeros_like(reached).scatter(-1, order, rank <= m)
