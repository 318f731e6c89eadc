"""The row operator: the custom operator `cda::soft_topk`, which torch.compile keeps whole, in PyTorch or in Triton.

Saved for the backward: the scores, k and one dual per row; the weights are recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cda_cli.ops.dual import Dual, exact_gradients, parts, usable
from cda_cli.ops.exact import solve_exact
from cda_cli.ops.iterative import (
    annealing,
    iterative_dual,
    iterative_rows,
    iterative_rows_gradients,
    solve_iterative,
)
from cda_cli.ops.transforms import differentiated_again, gradients


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
        from cda_cli.ops.triton.row_launches import exact_forward

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
        from cda_cli.ops.triton.row_launches import exact_backward

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
    grads: tuple[Tensor | None, ...]
    if differentiated_again():
        settings = ctx.settings[:-1]  # but the backend
        grads = gradients(
            lambda scores, budget: differentiable_rows(scores, budget, *settings)[0].to(scores.dtype),
            ctx.saved_tensors[:2],
            ctx.needs_input_grad[:2],
            grad_weights,
        )
    else:
        grads = soft_topk_rows_backward(grad_weights, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *(None for _ in ctx.settings))


soft_topk_rows.register_autograd(_backward, setup_context=_save)


@soft_topk_rows.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], scores: Tensor, budget: Tensor, *settings: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Rows are independent: those of the whole batch are solved as one."""

    def rows(tensor: Tensor, dim: int | None) -> Tensor:
        batch = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return batch.flatten(0, 1)

    weights, saved = soft_topk_rows(rows(scores, in_dims[0]), rows(budget, in_dims[1]), *settings)
    batch = (info.batch_size, -1)
    return (weights.unflatten(0, batch), saved.unflatten(1, batch)), (0, 1)


def differentiable_rows(
    scores: Tensor, budget: Tensor, eps: float, solver: str, n_iters: int, eps_init: float, eps_decay: float
) -> tuple[Tensor, Tensor]:
    """Weights [R, n] in the dtype of `budget`, and the threshold a [R] without gradient.

    For any transform of torch.func and any number of derivatives: made of PyTorch's own operators, but for the solution
    that they start from. scores [R, n], −inf where masked; budget [R] in the arithmetic dtype.
    """
    scores = scores.to(budget.dtype)
    if not scores.shape[-1]:
        return scores.clone(), torch.full_like(budget, torch.inf)
    if solver == "iterative":
        plan = annealing(eps, n_iters, eps_init, eps_decay)
        weights, history = solve_iterative(scores, budget, plan)
        return weights, iterative_dual(history.detach()).threshold(plan.last)
    # The capped entries and a number near each score stay as the solution has them; with these fixed the weights are
    # a closed formula (docs/operator.md), whose derivatives are those of the operator.
    solved, given = scores.detach(), budget.detach()
    _, saved = soft_topk_rows(solved, given, eps, solver, n_iters, eps_init, eps_decay, "torch")
    dual = Dual(*saved.unbind())
    shift = dual.shift.unsqueeze(-1)
    capped = (solved - shift) / eps + dual.peak.log().unsqueeze(-1) > 0
    out_of_free = capped | (solved == -torch.inf)
    free = ((scores - shift) / eps).masked_fill(out_of_free, torch.finfo(scores.dtype).min).softmax(-1)
    mass = torch.where(dual.everything_capped(), 0.0, usable(budget) - capped.sum(-1))
    return torch.where(capped, 1.0, free * mass.unsqueeze(-1)), dual.threshold(eps)
