"""The row operator: the custom operator `cda::soft_topk`, which torch.compile keeps whole, in PyTorch or in Triton.

The backward gets the scores, k and what the solver keeps of each row, and computes the weights again.

Shapes: R rows, n entries, m numbers that the solver keeps of each row (`RowSolver.kept`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .solve_spec import SolveSpec
from .solvers import SOLVERS, row_solver
from .transforms import differentiated_again, gradients, only_values


def solve_rows(
    scores: Tensor, budget: Tensor, solver: str, n_iters: int, schedule: list[float], backend: str
) -> tuple[Tensor, Tensor]:
    """Weights [R, n] in the dtype of `scores`, and what the backward needs of each row, [m, R], without gradient.

    scores [R, n], −inf where masked; budget [R] in the arithmetic dtype; solver, n_iters and schedule as of
    `SolveSpec.flat`; backend "torch" or "triton", which computes in float32.
    """
    code, spec = row_solver(solver, backend), SolveSpec.of_flat(solver, n_iters, schedule)
    rows = code.prepared(scores, budget.dtype)
    weights, saved = code.solve(rows, budget, lambda: (scores > -torch.inf).sum(-1), spec)
    return weights.to(scores.dtype), saved


soft_topk_rows = torch.library.custom_op("cda::soft_topk", mutates_args=())(solve_rows)


@soft_topk_rows.register_fake
def _(scores: Tensor, budget: Tensor, solver: str, n_iters: int, schedule: list[float], _: str) -> Any:
    kept = SOLVERS[solver].kept(SolveSpec.of_flat(solver, n_iters, schedule))
    return scores.new_empty(scores.shape), budget.new_empty(kept, *budget.shape)


@torch.library.custom_op("cda::soft_topk_backward", mutates_args=())
def soft_topk_rows_backward(
    grad_weights: Tensor,
    scores: Tensor,
    budget: Tensor,
    saved: Tensor,
    solver: str,
    n_iters: int,
    schedule: list[float],
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(∂L/∂s [R, n] in the dtype of `scores`, ∂L/∂k [R])."""
    code, spec = row_solver(solver, backend), SolveSpec.of_flat(solver, n_iters, schedule)
    rows = code.prepared(scores, budget.dtype)
    grad_scores, grad_budget = code.gradients(grad_weights, rows, budget, saved, spec)
    return grad_scores.to(scores.dtype), grad_budget


@soft_topk_rows_backward.register_fake
def _(grad_weights: Tensor, scores: Tensor, budget: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape), budget.new_empty(budget.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    scores, budget, *ctx.settings = inputs
    ctx.save_for_backward(scores, budget, output[1])


def _backward(ctx: Any, grad_weights: Tensor, _grad_saved: Tensor) -> tuple[Any, ...]:
    grads: tuple[Tensor | None, ...]
    if differentiated_again():
        *flat, _backend = ctx.settings
        spec = SolveSpec.of_flat(*flat)
        grads = gradients(
            lambda scores, budget: differentiable_rows(scores, budget, spec)[0].to(scores.dtype),
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
    info: Any, in_dims: tuple[Any, ...], scores: Tensor, budget: Tensor, *settings: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Rows are independent: those of the whole batch are solved as one."""

    def rows(tensor: Tensor, dim: int | None) -> Tensor:
        batch = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        return batch.flatten(0, 1)

    weights, saved = soft_topk_rows(rows(scores, in_dims[0]), rows(budget, in_dims[1]), *settings)
    batch = (info.batch_size, -1)
    return (weights.unflatten(0, batch), saved.unflatten(1, batch)), (0, 1)


def weights_of_rows(scores: Tensor, budget: Tensor, spec: SolveSpec, backend: str) -> Tensor:
    """Weights [R, n] as `solve_rows` gives them, with the gradient where one is asked for."""
    run = solve_rows if only_values(scores, budget) else soft_topk_rows
    return run(scores, budget, *spec.flat(), backend)[0]


def differentiable_rows(scores: Tensor, budget: Tensor, spec: SolveSpec) -> tuple[Tensor, Tensor]:
    """Weights [R, n] in the dtype of `budget`, and the threshold a [R] without gradient.

    It serves any transform of torch.func and any number of derivatives, by PyTorch's own operators. scores [R, n], −inf
    where masked; budget [R] in the arithmetic dtype.
    """
    scores = scores.to(budget.dtype)
    if not scores.shape[-1]:
        return scores.clone(), torch.full_like(budget, torch.inf)

    def solve(scores: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
        return soft_topk_rows(scores, budget, *spec.flat(), "torch")

    return SOLVERS[spec.solver].differentiable(scores, budget, solve, spec)
