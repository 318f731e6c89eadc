"""The row operator: the custom operator `cda::soft_topk`, which torch.compile keeps whole, in PyTorch or in Triton.

Saved for the backward: the scores, k and one dual per row; the weights are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cda_cli.ops.dual import Dual, exact_gradients, parts
from cda_cli.ops.exact import solve_exact
from cda_cli.ops.iterative import annealing, iterative_rows, iterative_rows_gradients


@torch.library.custom_op("cda::soft_topk", mutates_args=())
def soft_topk_rows(
    scores: Tensor,
    budget: Tensor,
    eps: float,
    solver: str,
    n_iters: int,
    eps_init: float,
    eps_decay: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Weights [R, n] in the dtype of `scores`, and what the backward needs of each row.

    scores [R, n], −inf where masked; budget [R] in the arithmetic dtype. The second output is the dual, [2, R] (shift,
    peak), for the exact solver and the history of a, [n_iters, R], for the iterative one; it has no gradient.
    backend is "torch" or "triton"; the latter computes in float32.
    """
    if solver == "iterative":
        weights, saved = iterative_rows(scores, budget, annealing(eps, n_iters, eps_init, eps_decay), backend)
        return weights.to(scores.dtype), saved
    if backend == "triton":
        from cda_cli.ops.triton.rows import exact_forward

        return exact_forward(scores, budget, eps)
    rows = scores.to(budget.dtype)
    weights, dual = solve_exact(_finite(rows), budget, (rows > -torch.inf).sum(-1), eps)
    return weights.to(scores.dtype), torch.stack(dual)


@soft_topk_rows.register_fake
def _(
    scores: Tensor,
    budget: Tensor,
    eps: float,
    solver: str,
    n_iters: int,
    eps_init: float,
    eps_decay: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), budget.new_empty(2 if solver == "exact" else n_iters, *budget.shape)


@torch.library.custom_op("cda::soft_topk_backward", mutates_args=())
def soft_topk_rows_backward(
    grad_weights: Tensor,
    scores: Tensor,
    budget: Tensor,
    saved: Tensor,
    eps: float,
    solver: str,
    n_iters: int,
    eps_init: float,
    eps_decay: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(∂L/∂s [R, n] in the dtype of `scores`, ∂L/∂k [R])."""
    if solver == "iterative":
        plan = annealing(eps, n_iters, eps_init, eps_decay)
        grad_scores, grad_budget = iterative_rows_gradients(scores, budget, saved, grad_weights, plan, backend)
        return grad_scores.to(scores.dtype), grad_budget
    if backend == "triton":
        from cda_cli.ops.triton.rows import exact_backward

        return exact_backward(grad_weights, scores, saved, eps)
    rows, grad = scores.to(budget.dtype), grad_weights.to(budget.dtype)
    grad_scores, grad_budget = exact_gradients(parts(_finite(rows), Dual(*saved), eps), grad)
    return grad_scores.div_(eps).to(scores.dtype), grad_budget


@soft_topk_rows_backward.register_fake
def _(
    grad_weights: Tensor,
    scores: Tensor,
    budget: Tensor,
    saved: Tensor,
    eps: float,
    solver: str,
    n_iters: int,
    eps_init: float,
    eps_decay: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), budget.new_empty(budget.shape)


def _finite(rows: Tensor) -> Tensor:
    """Masked entries as the lowest finite number, so that a row of nothing else has a softmax."""
    return rows.clamp(min=torch.finfo(rows.dtype).min)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, budget, *ctx.settings = inputs
    ctx.save_for_backward(scores, budget, output[1])


def _backward(ctx: Any, grad_weights: Tensor, _grad_saved: Tensor) -> tuple[Any, ...]:
    grads = soft_topk_rows_backward(grad_weights, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *(None for _ in ctx.settings))


soft_topk_rows.register_autograd(_backward, setup_context=_save)
