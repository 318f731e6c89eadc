"""The fused attention: the custom operator `cda::fused_attention`, its fake tensors and its gradient.

Where k ≤ 2 is known, the forward takes `one_pass_kernel`, or where `Layout.one_pass_refusal` says that it does not fit
the two kernels `leader_kernel` and `leader_output_kernel`. For any k it takes `solve_kernel`, and `weighted_sum_kernel`
or where `Layout.weighted_sum_refusal` says that it does not fit `output_kernel`. The backward gets query, key, value,
five numbers per row, and the output (k ≤ 2) or its part from free entries (any k).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..attention_inputs import AttentionInputs, budget_of_each
from ..decoding import DecodingInputs
from ..dense import differentiable_attention
from ..documents import VisibleRanges, visible_ranges
from ..precision import in_own_precision
from ..solve_spec import SolveSpec
from ..transforms import differentiated_again, gradients, observed
from .attention_few_queries import few_scores_kernel
from .attention_launches import (
    Layout,
    backward,
    backward_in_turn,
    dual_length,
    heads_inside,
    leader_and_output,
    one_pass,
    padded,
    solve_and_output,
)
from .row_launches import exact_forward
from .row_solvers import KERNELS
from .tiles import BEYOND

# So few queries are not worth a program for each block of them.
FEW_QUERIES = 4


def few_scores(
    query: Tensor, key: Tensor, ranges: VisibleRanges | None, lengths: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """The scores [B, H, T, S] float32 of a few queries, −inf where a query does not see the key.

    A query sees the keys of its range, or the `lengths` [B] of its row, or all.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    scores = query.new_empty((B, H, T, S), dtype=torch.float32)
    members = H // G * T
    # Exact float32 products run outside the matrix units and keep both operands in registers.
    most, keys = (16, 32) if query.dtype == torch.float32 else (64, 64)
    queries = min(most, max(16, triton.next_power_of_2(members)))
    first, last = (query, query) if ranges is None else (ranges.first, ranges.last)
    few_scores_kernel[triton.cdiv(S, keys), B * G, triton.cdiv(members, queries)](
        query, key, first, last, query if lengths is None else lengths, scores, scale, *query.stride()[:3],
        *key.stride()[:3], G, H // G, T, S, D=D, BLOCK_D=padded(D), BLOCK_M=queries, BLOCK_N=keys, CAUSAL=causal,
        RANGES=ranges is not None, LENGTHS=lengths is not None, num_warps=4,
    )  # fmt: skip
    return scores


@in_own_precision  # Autocast would round its product.
def _few_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: float | Tensor,
    ranges: VisibleRanges | None,
    eps: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Output and statistics as `fused_attention` gives them.

    The scores [B, H, T, S] are few here. The row kernels solve them, and one product with the values gives the output.
    """
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    scores = few_scores(query, key, ranges, None, scale, causal)
    weights, (shift, peak) = exact_forward(scores.view(-1, S), budget_of_each(budget, query).view(-1), eps)
    weights = weights.to(value.dtype).view(B, G, -1, S)
    output = heads_inside(query, T).copy_((weights @ value).view(B, H, T, D))
    covered = shift <= torch.finfo(shift.dtype).min
    stats = torch.stack((
        torch.where(covered, 0.0, shift / scale),
        torch.where(covered, BEYOND.value, peak.log2()),
        torch.zeros_like(shift),  # margin and mass are for a backward, and there is none
        torch.zeros_like(shift),
    ))  # fmt: skip
    return output, stats.view(4, B, H, T)


@in_own_precision
def decode_by_scores(inputs: DecodingInputs) -> Tensor:
    """Output [B, H, T, D] for any k and solver; the first three inputs are as `fused_attention` takes them."""
    query, key, value, lengths, *_, spec, scale = inputs
    (B, H, T, D), (G, S) = query.shape, key.shape[1:3]
    with torch.cuda.device_of(query):
        scores = few_scores(query, key, None, lengths, scale, True).view(-1, S)
        weights, _ = KERNELS[spec.solver].solve(scores, inputs.budgets().reshape(-1), lambda: scores, spec)
    return (weights.to(value.dtype).view(B, G, -1, S) @ value).view(B, H, T, D)


def _ranges(documents: Tensor | None, query: Tensor, causal: bool) -> VisibleRanges:
    """The ranges of packed documents. Without documents the kernels compute them, and read none of the tensors."""
    if documents is None:
        return VisibleRanges(query, query, query, query)
    return visible_ranges(documents, query.shape[2], causal)


def _factor(eps: float, scale: float) -> float:
    """The factor from q·k to powers of two."""
    return scale / eps * math.log2(math.e)


def attend(query: Tensor, key: Tensor, value: Tensor, budget: float | Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Output and statistics as `fused_attention` gives them, with the gradient if `trained`, the last of `others`.

    Where nothing needs the registration, it does without. A budget may then be the one number that is the k of all.
    """
    if observed(query, key, value) or (isinstance(budget, Tensor) and observed(budget)):
        outputs = fused_attention(query, key, value, budget_of_each(budget, query), *others)
    elif others[-1]:
        outputs = _Attention.apply(query, key, value, budget, *others)  # type: ignore[no-untyped-call]
    else:
        outputs = _forward(query, key, value, budget, *others)
    return outputs[0], outputs[1]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: float | Tensor,
    documents: Tensor | None,
    eps: float,
    scale: float,
    causal: bool,
    at_most_two: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output [B, H, T, D], statistics [4, B, H, T] float32 (see `solve_kernel`), leaders, and the free output.

    `at_most_two` says that no k exceeds 2; a row whose k does is NaN. The capped leaders are then [B, H, T] int32.
    Otherwise, if `trained` and in half precision, the free output [B, H, T, D] is the part of the output that comes
    from free entries. Each of the two is for the backward, and None where it is not needed.

    query [B, H, T, D]; key, value [B, G, S, D] with H a multiple of G, all of one dtype (float32, bf16, fp16) and
    contiguous in the last dimension; budget [B, H, T] float32, contiguous, or a number; documents [B, S] or None;
    scale > 0.
    """
    stats = query.new_empty((4, *query.shape[:3]), dtype=torch.float32)
    output, leaders, free_output = _outputs(query, at_most_two, trained)
    if not output.numel():
        return output, stats, leaders, free_output
    ranges = _ranges(documents, query, causal)
    with torch.cuda.device_of(query):
        if query.shape[2] <= FEW_QUERIES and not trained:
            seen = None if documents is None else ranges
            output, stats = _few_queries(query, key, value, budget, seen, eps, scale, causal)
            return output, stats, leaders, free_output
        budgets = (budget,) if isinstance(budget, Tensor) else ()
        layout = Layout.of(query, key, value, *budgets, causal=causal, documents=documents, one_budget=not budgets)
        factor = _factor(eps, scale)
        if at_most_two and (once := one_pass(layout)):
            once(
                query, key, value, key, value, budget, ranges.first, ranges.last, output,
                stats, leaders, factor,
            )  # fmt: skip
        elif at_most_two:
            lead, put_out = leader_and_output(layout)
            lead(query, key, key, ranges.first, ranges.last, stats, leaders)
            put_out(
                query, key, value, value, budget, ranges.first, ranges.last, output,
                stats, leaders, factor,
            )  # fmt: skip
        else:
            solve, put_out = solve_and_output(layout, split=free_output is not None)
            solve(query, key, budget, ranges.first, ranges.last, stats, factor)
            put_out(
                query, key, value, stats, ranges.first, ranges.last, output,
                output if free_output is None else free_output, factor,
            )  # fmt: skip
    return output, stats, leaders, free_output


@torch.library.custom_op("cda::fused_attention", mutates_args=())
def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    documents: Tensor | None,
    eps: float,
    scale: float,
    causal: bool,
    at_most_two: bool,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The registered `_forward`, with a tensor of budgets, and empty tensors in place of None.

    The compiler fuses the budgets with what computes them.
    """
    output, stats, *others = _forward(query, key, value, budget, documents, eps, scale, causal, at_most_two, trained)
    leaders, free_output = (query.new_empty(0) if x is None else x for x in others)
    return output, stats, leaders, free_output


def _outputs(query: Tensor, at_most_two: bool, trained: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Empty tensors for output, leaders and the free part of the output, as `_forward` returns them."""
    T = query.shape[2]
    leaders = query.new_empty(query.shape[:3], dtype=torch.int32) if at_most_two else None
    free_output = heads_inside(query, T) if _splits(query, at_most_two, trained) else None
    return heads_inside(query, T), leaders, free_output


def _splits(query: Tensor, at_most_two: bool, trained: bool) -> bool:
    """Whether the backward needs the part of the output that comes from free entries."""
    return trained and not at_most_two and query.dtype != torch.float32


@fused_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, budget: Tensor, *settings: Any) -> tuple[Tensor, ...]:
    *_, at_most_two, trained = settings
    output, *others = _outputs(query, at_most_two, trained)
    stats = budget.new_empty(4, *query.shape[:3])
    return output, stats, *(query.new_empty(0) if x is None else x for x in others)


def _gradients(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summed: Tensor,
    stats: Tensor,
    leaders: Tensor | None,
    documents: Tensor | None,
    eps: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, each in its dtype, and duals as `query_kernel` writes them.

    `summed` is the output where there are leaders, and its free part elsewhere (in float32 it is not read).
    """
    B, H, T, _ = query.shape
    grad_query = heads_inside(query, T)
    grad_key, grad_value = heads_inside(key, key.shape[2]), heads_inside(value, key.shape[2])
    duals = stats.new_empty(4, B, H, dual_length(T))
    if not grad_query.numel():
        return grad_query, grad_key.zero_(), grad_value.zero_(), duals
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    ranges = _ranges(documents, query, causal)
    factor, unit = _factor(eps, scale), scale / eps
    found = stats if leaders is None else leaders
    layout = Layout.of(
        query, key, value, stats, found, causal=causal, documents=documents, grad_output=grad_output, summed=summed
    )
    with torch.cuda.device_of(query):
        if in_turn := backward_in_turn(layout, leaders=leaders is not None):
            sums, turns = stats.new_empty(in_turn.sums), stats.new_empty(in_turn.turns, dtype=torch.int32)
            in_turn.prepare(value, grad_output, summed, stats, found, ranges.first, duals, sums, turns, factor)
            in_turn.add_up(
                query, key, value, grad_output, duals, ranges.low, ranges.high, grad_key, grad_value, sums, turns,
                factor, unit,
            )  # fmt: skip
            in_turn.finish(sums, grad_query, unit)
            return grad_query, grad_key, grad_value, duals
        to_query, to_key_value = backward(layout, leaders=leaders is not None)
        to_query(
            query, key, value, value, grad_output, summed, stats, found, duals,
            ranges.first, ranges.last, grad_query, factor, unit,
        )  # fmt: skip
        to_key_value(
            query, key, value, grad_output, duals, *ranges, grad_key, grad_value, factor, unit,
        )  # fmt: skip
    return grad_query, grad_key, grad_value, duals


def _budget_gradient(duals: Tensor, T: int) -> Tensor:
    """The gradient of the budget, [B, H, T]: δ of each query."""
    return duals[0, :, :, :T].contiguous()


@torch.library.custom_op("cda::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summed: Tensor,
    stats: Tensor,
    leaders: Tensor | None,
    documents: Tensor | None,
    eps: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The registered `_gradients`. Last comes the gradient of the budget, [B, H, T] float32."""
    grad_query, grad_key, grad_value, duals = _gradients(
        grad_output, query, key, value, summed, stats, leaders, documents, eps, scale, causal
    )
    return grad_query, grad_key, grad_value, _budget_gradient(duals, query.shape[2])


@fused_attention_backward.register_fake
def _(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, summed: Tensor, stats: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S = key.shape[2]
    grads = heads_inside(query, query.shape[2]), heads_inside(key, S), heads_inside(value, S)
    return (*grads, stats.new_empty(query.shape[:3]))


def threshold(stats: Tensor, eps: float, scale: float) -> Tensor:
    """a [B, H, T] from the statistics; +inf where k covers all that the query sees."""
    shift, peak = stats[0], stats[1]
    return torch.where(peak >= BEYOND.value, torch.inf, eps * math.log(2) * peak - scale * shift)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    query, key, value, budget, documents, *ctx.settings = inputs
    ctx.number, budget = (None, budget) if isinstance(budget, Tensor) else (budget, None)
    result, stats, leaders, free_output = output
    *_, at_most_two, trained = ctx.settings
    summed = free_output if _splits(query, at_most_two, trained) else result
    ctx.save_for_backward(query, key, value, summed, stats, leaders if at_most_two else None, documents, budget)
    ctx.mark_non_differentiable(*(x for x in output[1:] if x is not None))
    ctx.set_materialize_grads(False)  # Else each backward would fill a tensor of zeros for each of these.


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Any, ...]:
    eps, scale, causal, _, _ = ctx.settings
    query, key, value, summed, stats, leaders, documents, budget = ctx.saved_tensors
    is_needed = ctx.needs_input_grad
    grads: tuple[Tensor | None, ...]
    if grad_output is None:
        grads = (None,) * 4
    elif differentiated_again():
        spec = SolveSpec("exact", eps)
        grads = gradients(
            lambda *qkvb: differentiable_attention(AttentionInputs._make((*qkvb, documents, scale, causal)), spec)[0],
            (query, key, value, budget if ctx.number is None else budget_of_each(ctx.number, query)),
            is_needed[:4],
            grad_output,
        )
    elif observed(grad_output, query, key, value, summed, stats):
        grads = fused_attention_backward(
            grad_output, query, key, value, summed, stats, leaders, documents, eps, scale, causal
        )
    else:
        *of_heads, duals = _gradients(
            grad_output, query, key, value, summed, stats, leaders, documents, eps, scale, causal
        )
        grads = (*of_heads, _budget_gradient(duals, query.shape[2]) if is_needed[3] else None)
    return (*grads[:3], grads[3] if is_needed[3] else None, None, *[None] * len(ctx.settings))


fused_attention.register_autograd(_backward, setup_context=_save)


class _Attention(torch.autograd.Function):
    """What the registration makes of the operator for autograd, without the registration."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        outputs = _forward(*inputs)
        _save(ctx, inputs, outputs)
        return outputs[:2]

    backward = staticmethod(_backward)
