"""Attention with the soft top-k in PyTorch, in blocks of queries: O(block × S) memory, forward and backward.

Each block goes from scores to weights to output. The backward gets what the solver keeps of each row (m numbers), and
computes the scores of the block again. The solver runs in PyTorch or, for backend "triton", by its row kernels. All of
it is the custom operator `cda::soft_topk_attention`, which torch.compile keeps whole.

Shapes: B batch, H heads, T queries, S keys, D head width; N = B·H; R = N·t rows of a block of t queries. The exact
solver has the scores in units of ε (the query is scaled by scale/ε), which saves a pass over the block. The iterative
solver changes ε as it goes, so it has them in their own units.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_inputs import AttentionInputs
from .dense import differentiable_attention
from .documents import VisibleRanges, visible_ranges
from .precision import in_own_precision
from .solve_spec import SolveSpec
from .solvers import SOLVERS, row_solver
from .transforms import differentiated_again, gradients

# Scores of one block. On a CPU they should stay in the cache; on a GPU each pass should be worth its launch.
BLOCK_SCORES_CPU = 2**19
BLOCK_SCORES_GPU = 2**25


def scores_at_once(device: torch.device) -> int:
    """Scores that attention in blocks holds at a time on `device`, unless 16 queries have more."""
    return BLOCK_SCORES_GPU if device.type == "cuda" else BLOCK_SCORES_CPU


class Block(NamedTuple):
    """Queries [start, stop) and the keys [0, keys) that at least one of them sees."""

    start: int
    stop: int
    keys: int


def blocks(query: Tensor, key: Tensor, causal: bool) -> Iterator[Block]:
    """Blocks of queries that see at least one key, for query [N, T, D] and key [N, S, D]."""
    N, T, _ = query.shape
    S = key.shape[1]
    if not S:
        return
    step = max(16, scores_at_once(query.device) // max(1, N * S))
    first = max(0, T - S) if causal else 0  # Queries before it see nothing.
    for start in range(first, T, step):
        stop = min(start + step, T)
        yield Block(start, stop, S - T + stop if causal else S)


def block_scores(query: Tensor, key: Tensor, block: Block, causal: bool, ranges: VisibleRanges | None) -> Tensor:
    """Scores [N, t, keys] of a block, −inf where the key is a later one or of another document."""
    scores = query[:, block.start : block.stop] @ key[:, : block.keys].transpose(1, 2)
    if ranges is not None:
        places = torch.arange(block.keys, device=scores.device)
        first, last = (bound[:, block.start : block.stop, None] for bound in (ranges.first, ranges.last))
        hidden = (places < first) | (places >= last)
        scores.view(len(hidden), -1, *scores.shape[1:]).masked_fill_(hidden.unsqueeze(1), -torch.inf)
    elif causal:
        # Only the last t keys can be masked. The rest of the block needs no mask.
        t = block.stop - block.start
        later = torch.full((t, t), -torch.inf, dtype=scores.dtype, device=scores.device).triu_(1)[:, -block.keys :]
        scores[..., -t:] += later
    return scores


def visible_keys(block: Block, query: Tensor, causal: bool, ranges: VisibleRanges | None) -> Tensor:
    """The number of keys that each row of the block sees, [N·t]."""
    N, t, last = query.shape[0], block.stop - block.start, block.keys
    if ranges is not None:
        counts = (ranges.last - ranges.first)[:, block.start : block.stop]
        return counts.unsqueeze(1).expand(-1, N // len(counts), -1).reshape(-1)
    counts = torch.arange(last - t + 1, last + 1, device=query.device) if causal else torch.full((t,), last)
    return counts.to(query.device).expand(N, t).reshape(-1)


def _arithmetic(budget: Tensor, query: Tensor, key: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Query [N, T, D], multiplied by `factor`, and key [N, S, D], in the dtype of the arithmetic."""
    return query.flatten(0, 1).to(budget.dtype) * factor, key.flatten(0, 1).to(budget.dtype)


@in_own_precision
def attend_in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    documents: Tensor | None,
    scale: float,
    causal: bool,
    solver: str,
    n_iters: int,
    schedule: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, T, D] in the dtype of `value`, the threshold a [B, H, T], and what the backward needs of each row.

    The first seven arguments are `AttentionInputs`, whose key heads are as many as its query heads. solver, n_iters and
    schedule are those of `SolveSpec.flat`. backend is "torch" or "triton". The third output is [m, B·H, T], with the
    scores in the unit of the solver (`RowSolver.in_units`); it has no gradient.
    """
    code, spec = row_solver(solver, backend), SolveSpec.of_flat(solver, n_iters, schedule)
    unit, in_units = code.in_units(spec)
    q, k = _arithmetic(budget, query, key, scale / unit)
    v = value.flatten(0, 1).to(budget.dtype)
    N, T, _ = q.shape
    ranges = None if documents is None else visible_ranges(documents, query.shape[2], causal)
    out = v.new_zeros(N, T, v.shape[-1])
    saved = budget.new_empty(code.kept(spec), N, T)
    code.save_unseen(saved)
    for block in blocks(q, k, causal):
        rows = slice(block.start, block.stop)
        scores = block_scores(q, k, block, causal, ranges)
        row_budget = budget.flatten(0, 1)[:, rows].reshape(-1)
        visible = functools.partial(visible_keys, block, q, causal, ranges)
        weights, row_saved = code.solve(scores.flatten(0, 1), row_budget, visible, in_units)
        saved[:, :, rows] = row_saved.view(len(saved), *scores.shape[:2])
        out[:, rows] = torch.bmm(weights.view_as(scores), v[:, : block.keys])
    B, H = query.shape[:2]
    threshold = code.threshold(saved, spec).view(B, H, T)
    return out.view(B, H, T, v.shape[-1]).to(value.dtype), threshold, saved


blockwise_attention = torch.library.custom_op("cda::soft_topk_attention", mutates_args=())(attend_in_blocks)


@blockwise_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, budget: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, H, T, _ = query.shape
    *_, solver, n_iters, schedule, _ = settings
    kept = SOLVERS[solver].kept(SolveSpec.of_flat(solver, n_iters, schedule))
    output = value.new_empty(B, H, T, value.shape[-1])
    return output, budget.new_empty(budget.shape), budget.new_empty(kept, B * H, T)


@torch.library.custom_op("cda::soft_topk_attention_backward", mutates_args=())
@in_own_precision
def blockwise_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    documents: Tensor | None,
    saved: Tensor,
    scale: float,
    causal: bool,
    solver: str,
    n_iters: int,
    schedule: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, each in its dtype, and of the budget [B, H, T]."""
    code, spec = row_solver(solver, backend), SolveSpec.of_flat(solver, n_iters, schedule)
    unit, in_units = code.in_units(spec)
    factor = scale / unit
    q, k = _arithmetic(budget, query, key, factor)
    v, grad_out = value.flatten(0, 1).to(budget.dtype), grad_output.flatten(0, 1).to(budget.dtype)
    ranges = None if documents is None else visible_ranges(documents, query.shape[2], causal)
    # The compiler was promised contiguous gradients, whatever the strides of the inputs.
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
    grad_budget = budget.new_zeros(budget.shape).flatten(0, 1)
    for block in blocks(q, k, causal):
        rows, keys = slice(block.start, block.stop), slice(0, block.keys)
        scores = block_scores(q, k, block, causal, ranges)
        shape = scores.shape
        grad_weights = torch.bmm(grad_out[:, rows], v[:, keys].transpose(1, 2)).flatten(0, 1)
        weights, grad_scores, grad_rows = code.weights_and_gradients(
            grad_weights,
            scores.flatten(0, 1),
            budget.flatten(0, 1)[:, rows].reshape(-1),
            saved[:, :, rows].flatten(1),
            in_units,
        )
        grad_scores, weights = grad_scores.view(shape), weights.view(shape)
        grad_budget[:, rows] = grad_rows.view(shape[:2])
        grad_q[:, rows] = torch.bmm(grad_scores, k[:, keys])
        grad_k[:, keys] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
        grad_v[:, keys] += torch.bmm(weights.transpose(1, 2), grad_out[:, rows])
    # q carries the factor already, so grad_k is complete. The gradient of the budget needs no factor: the budget does
    # not enter by way of the scores.
    grad_q *= factor
    return (
        grad_q.view(query.shape).to(query.dtype),
        grad_k.view(key.shape).to(key.dtype),
        grad_v.view(value.shape).to(value.dtype),
        grad_budget.view(budget.shape),
    )


@blockwise_attention_backward.register_fake
def _(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, budget: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # The real gradients are contiguous, whatever the strides of the inputs. empty_like would keep those strides.
    query_grad, key_grad, value_grad, budget_grad = (x.new_empty(x.shape) for x in (query, key, value, budget))
    return query_grad, key_grad, value_grad, budget_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, budget, documents, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, budget, documents, output[2])


def _backward(ctx: Any, grad_output: Tensor, _grad_threshold: Tensor, _grad_saved: Tensor) -> tuple[Any, ...]:
    grads: tuple[Tensor | None, ...]
    if differentiated_again():
        documents = ctx.saved_tensors[4]
        scale, causal, *flat, _backend = ctx.settings
        spec = SolveSpec.of_flat(*flat)
        grads = gradients(
            lambda *qkvb: differentiable_attention(AttentionInputs._make((*qkvb, documents, scale, causal)), spec)[0],
            ctx.saved_tensors[:4],
            ctx.needs_input_grad[:4],
            grad_output,
        )
    else:
        grads = blockwise_attention_backward(grad_output, *ctx.saved_tensors, *ctx.settings)
    return (*grads, None, *(None for _ in ctx.settings))


blockwise_attention.register_autograd(_backward, setup_context=_save)
