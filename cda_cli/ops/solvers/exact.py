"""The exact solver in PyTorch: Newton's method on F(y) = Σ min(1, y·exp(s_i/ε)) = k, y = exp(a/ε).

F is piecewise linear, concave and increasing. So it is Newton's method to fix the capped set, solve for a, cap what
exceeds 1, and repeat. It starts with nothing capped, approaches the solution from the left, and ends after finitely
many steps. With the capped set fixed, the free weights are (k − m)·softmax, so a step is one softmax. Only the rows
whose largest weight exceeds 1 take another step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dual import FAR, Dual, Parts, exact_gradients, parts, usable
from ..solve_spec import SolveSpec
from .base import RowSolver, Solve, Visible


class Exact(RowSolver):
    """The optimum. It saves the dual of each row, shift and peak."""

    def kept(self, spec: SolveSpec) -> int:
        return 2

    def in_units(self, spec: SolveSpec) -> tuple[float, SolveSpec]:
        """The solver looks at scores/ε only. Where they are held so, it has nothing to divide."""
        return spec.eps, SolveSpec(spec.solver, 1.0)

    def prepared(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """Masked entries are the lowest finite number, so that a row of nothing else has a softmax."""
        scores = scores.to(dtype)
        return scores.clamp(min=torch.finfo(dtype).min)

    def save_unseen(self, saved: Tensor) -> None:
        """Everything that such a row sees is capped."""
        saved[0], saved[1] = torch.finfo(saved.dtype).min, 1.0

    def solve(self, scores: Tensor, budget: Tensor, visible: Visible, spec: SolveSpec) -> tuple[Tensor, Tensor]:
        weights, dual = solve_exact(scores, budget, visible(), spec.eps)
        return weights, torch.stack(dual)

    def gradients(
        self, grad_weights: Tensor, scores: Tensor, budget: Tensor, saved: Tensor, spec: SolveSpec
    ) -> tuple[Tensor, Tensor]:
        return self._gradients(parts(scores, Dual(*saved), spec.eps), grad_weights.to(budget.dtype), spec)

    def weights(self, scores: Tensor, saved: Tensor, spec: SolveSpec) -> Tensor:
        return parts(scores, Dual(*saved), spec.eps).weights()

    def weights_and_gradients(
        self, grad_weights: Tensor, scores: Tensor, budget: Tensor, saved: Tensor, spec: SolveSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        both = parts(scores, Dual(*saved), spec.eps)
        grads = self._gradients(both, grad_weights.to(budget.dtype), spec)
        return both.weights(), *grads

    @staticmethod
    def _gradients(parts: Parts, grad_weights: Tensor, spec: SolveSpec) -> tuple[Tensor, Tensor]:
        grad_scores, grad_budget = exact_gradients(parts, grad_weights)
        return grad_scores if spec.eps == 1.0 else grad_scores.div_(spec.eps), grad_budget

    def threshold(self, saved: Tensor, spec: SolveSpec) -> Tensor:
        return spec.eps * Dual(*saved).threshold(1.0)

    def differentiable(self, scores: Tensor, budget: Tensor, solve: Solve, spec: SolveSpec) -> tuple[Tensor, Tensor]:
        """The capped entries and a number near each score stay as the solution has them.

        With these fixed, the weights are a closed formula (docs/operator.md), whose derivatives are those of the
        operator.
        """
        solved = scores.detach()
        _, saved = solve(solved, budget.detach())
        dual = Dual(*saved.unbind())
        shift = dual.shift.unsqueeze(-1)
        capped = (solved - shift) / spec.eps + dual.peak.log().unsqueeze(-1) > 0
        out_of_free = capped | (solved == -torch.inf)
        free = ((scores - shift) / spec.eps).masked_fill(out_of_free, torch.finfo(scores.dtype).min).softmax(-1)
        mass = torch.where(dual.everything_capped(), 0.0, usable(budget) - capped.sum(-1))
        return torch.where(capped, 1.0, free * mass.unsqueeze(-1)), dual.threshold(spec.eps)


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
    if len(rows):
        _cap(rows, scores, budget, weights, dual, eps)
    everything = torch.nonzero(full).squeeze(-1)
    if len(everything):
        dual.shift[everything] = torch.finfo(scores.dtype).min
        of_everything = scores[everything]
        visible_or_nan = (of_everything > torch.finfo(scores.dtype).min).to(scores.dtype)
        weights[everything] = torch.where(of_everything.isnan(), torch.nan, visible_or_nan)
    return weights, dual


def _cap(rows: Tensor, scores: Tensor, budget: Tensor, weights: Tensor, dual: Dual, eps: float) -> None:
    """Takes further steps for `rows`, whose largest weight exceeds 1, and changes their weights and dual."""
    free_scores, mass, newest = (tensor.index_select(0, rows) for tensor in (scores, budget, weights))
    capped = torch.zeros_like(newest)
    while len(rows):
        newly = torch.threshold(newest, 1.0, 0.0).clamp_(max=1.0)
        # In exact arithmetic they are always fewer than `mass`. Rounding alone can break that, and only if the entries
        # above 1 are all 1 to rounding. Nothing more is capped then, and the largest weight is 1.
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


def _free_part(free_scores: Tensor, mass: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """mass·softmax(scores/ε) [R, n], the largest score [R] and its weight [R]."""
    shift = free_scores.amax(-1)
    logits = free_scores if eps == 1.0 else (free_scores - shift.unsqueeze(-1)).div_(eps)
    weights = logits.softmax(-1).mul_(mass.unsqueeze(-1))
    return weights, shift, weights.amax(-1)
