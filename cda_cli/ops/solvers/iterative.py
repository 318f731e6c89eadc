"""The iterative solver in PyTorch: ε-scaled coordinate descent, as `colt5_attention.coor_descent` computes it.

From b = −s, for t = 1 … n_iters, with ε_1 = max(eps_init, ε) and ε_{t+1} = max(ε_t · eps_decay, ε):

    u_t = (s + b)/ε_t,   a_t = ε_t (log k − logsumexp u_t),   b = −relu(s + a_t)

and λ = exp((s + a + b)/ε_last), where ε_last has decayed once more after the last update. b follows from a, so the
state of forward and backward is one number per row and iteration. The operations have the published order: at a small ε
their rounding is the largest part of the error, and parity with the published code needs the same rounding.

Sources: arXiv 1502.04759, 2303.09752 (coordinate descent), 1610.06519, 2304.04947 (ε-scaling).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..dual import Dual, usable
from ..solve_spec import SolveSpec
from .base import RowSolver, Solve, Visible


class Annealing(NamedTuple):
    """ε of each iteration, and the final ε, which turns the dual into weights."""

    steps: tuple[float, ...]
    last: float

    @classmethod
    def of(cls, spec: SolveSpec) -> Annealing:
        values = [max(spec.eps_init, spec.eps)]
        for _ in range(spec.n_iters):
            values.append(max(values[-1] * spec.eps_decay, spec.eps))
        return cls(tuple(values[:-1]), values[-1])


class Iterative(RowSolver):
    """n_iters steps of coordinate descent. It saves the history of a, one number for each step."""

    def kept(self, spec: SolveSpec) -> int:
        return spec.n_iters

    def solve(self, scores: Tensor, budget: Tensor, visible: Visible, spec: SolveSpec) -> tuple[Tensor, Tensor]:
        return solve_iterative(scores, budget, Annealing.of(spec))

    def gradients(
        self, grad_weights: Tensor, scores: Tensor, budget: Tensor, saved: Tensor, spec: SolveSpec
    ) -> tuple[Tensor, Tensor]:
        return iterative_gradients(scores, budget, saved, grad_weights.to(budget.dtype), Annealing.of(spec))

    def weights(self, scores: Tensor, saved: Tensor, spec: SolveSpec) -> Tensor:
        return (scores + saved[-1].unsqueeze(-1)).clamp_(max=0).div_(Annealing.of(spec).last).exp_()

    def threshold(self, saved: Tensor, spec: SolveSpec) -> Tensor:
        """The last a: the threshold of a dual whose peak is 1, whatever its ε."""
        last = saved[-1]
        return Dual(-last, torch.ones_like(last)).threshold(spec.eps)

    def differentiable(self, scores: Tensor, budget: Tensor, solve: Solve, spec: SolveSpec) -> tuple[Tensor, Tensor]:
        """PyTorch differentiates the iteration itself."""
        weights, history = solve_iterative(scores, budget, Annealing.of(spec))
        return weights, self.threshold(history.detach(), spec)


def solve_iterative(scores: Tensor, budget: Tensor, plan: Annealing) -> tuple[Tensor, Tensor]:
    """Weights [R, n] and the history of a [n_iters, R].

    scores [R, n] float32 or float64, −inf where masked; budget [R], the k of each row.
    """
    masked = scores == -torch.inf
    scores = scores.masked_fill(masked, torch.finfo(scores.dtype).min)
    log_k = usable(budget).clamp(1e-20, torch.finfo(budget.dtype).max).log().unsqueeze(-1)
    a, history = None, []
    for eps in plan.steps:
        a = eps * (log_k - _scaled(scores, a, eps, masked).logsumexp(-1, keepdim=True))
        history.append(a.squeeze(-1))
    assert a is not None
    weights = (scores + a + _b(scores, a)).div_(plan.last).masked_fill_(masked, -torch.inf).exp_()
    return weights, torch.stack(history)


def iterative_gradients(
    scores: Tensor, budget: Tensor, history: Tensor, grad_weights: Tensor, plan: Annealing
) -> tuple[Tensor, Tensor]:
    """(∂L/∂s [R, n], ∂L/∂k [R]): the unrolled iteration run backwards, recomputed from the history of a."""
    masked = scores == -torch.inf
    scores = scores.masked_fill(masked, torch.finfo(scores.dtype).min)
    a = history[-1].unsqueeze(-1)
    weights = (scores + a + _b(scores, a)).div_(plan.last).exp_().masked_fill_(masked, 0.0)
    grad_scores = weights.mul_(grad_weights).div_(plan.last)
    grad_a = grad_scores.sum(-1, keepdim=True)
    grad_b = grad_scores.clone()
    grad_log_k = torch.zeros_like(grad_a)
    for step in reversed(range(len(plan.steps))):
        a, eps = history[step].unsqueeze(-1), plan.steps[step]
        through_relu = grad_b.masked_fill_(scores + a <= 0, 0.0)
        grad_scores -= through_relu
        grad_a -= through_relu.sum(-1, keepdim=True)
        grad_log_k += eps * grad_a
        previous = history[step - 1].unsqueeze(-1) if step else None
        grad_b = _scaled(scores, previous, eps, masked).softmax(-1).mul_(-grad_a)
        grad_scores += grad_b
        grad_a = torch.zeros_like(grad_a)
    grad_scores -= grad_b  # b starts as −s
    return grad_scores.masked_fill_(masked, 0.0), (grad_log_k / budget.clamp(min=1e-20).unsqueeze(-1)).squeeze(-1)


def _b(scores: Tensor, a: Tensor | None) -> Tensor:
    return -scores if a is None else -(scores + a).relu_()


def _scaled(scores: Tensor, a: Tensor | None, eps: float, masked: Tensor) -> Tensor:
    scaled = (scores + _b(scores, a)).div_(eps)
    return scaled.masked_fill_(masked, torch.finfo(scores.dtype).min)
