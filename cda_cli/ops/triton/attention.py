"""The fused attention: the custom operator `cda::fused_attention`, its fake tensors, its gradient and its launches.

Two forward passes: `leader_kernel` where k ≤ 2 is known, `solve_kernel` and `output_kernel` for any k. Kept for the
backward: query, key, value, five numbers per row, and the output (k ≤ 2) or its part from free entries (any k).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cda_cli.ops.documents import VisibleRanges, visible_ranges
from cda_cli.ops.triton.attention_backward import dual_kernel, key_value_kernel, query_kernel
from cda_cli.ops.triton.attention_forward import few_scores_kernel, output_kernel, solve_kernel
from cda_cli.ops.triton.attention_leader import follower_kernel, leader_kernel
from cda_cli.ops.triton.rows import exact_forward
from cda_cli.ops.triton.tiles import BEYOND, INTERPRETED

# Up to so many queries are too few for a program per block of queries.
FEW_QUERIES = 4


class Tile(NamedTuple):
    """Queries and keys of a tile, and how Triton compiles the loop over them."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    step: int = 1  # tiles that a step of the loop takes, where the kernel has such steps

    def options(self, width: int, causal: bool, documents: Tensor | None) -> dict[str, Any]:
        """What every kernel over tiles takes by name."""
        shape = {"D": width, "BLOCK_D": _padded(width), "BLOCK_M": self.queries, "BLOCK_N": self.keys}
        sight = {"CAUSAL": causal, "RANGES": documents is not None}
        return shape | sight | {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


def tile(kernel: str, width: int, dtype: torch.dtype) -> Tile:
    """The tile of each kernel for heads of `width`, as measured on Hopper (docs/kernels.md)."""
    if dtype == torch.float32:
        # Exact float32 products run outside the matrix units and keep both operands in registers.
        return Tile(16, 32, 4, 1) if width > 64 else Tile(32, 32, 4, 1)
    if width > 128:
        return {
            "leader": Tile(64, 64, 4, 2),
            "follower": Tile(64, 64, 4, 2),
            "solve": Tile(64, 64, 4, 2),
            "output": Tile(64, 64, 4, 2),
            "split": Tile(64, 32, 8, 2),
            "query": Tile(64, 32, 4, 2),
            "key_value": Tile(32, 64, 8, 1),
        }[kernel]
    if width > 64:
        return {
            "leader": Tile(64, 128, 4, 3, 168),
            "follower": Tile(64, 64, 4, 3),
            "solve": Tile(64, 64, 4, 3, 168),
            "output": Tile(64, 64, 4, 3),
            "split": Tile(64, 64, 4, 3),
            "query": Tile(128, 64, 8, 3),
            "key_value": Tile(64, 64, 4, 2),
        }[kernel]
    return {
        "leader": Tile(64, 128, 4, 2, 168, step=2),
        "follower": Tile(64, 128, 4, 2, 168),
        "solve": Tile(64, 64, 4, 3, 168),
        "output": Tile(64, 64, 4, 3),
        "split": Tile(64, 64, 4, 3, 168),
        "query": Tile(64, 64, 4, 3),
        "key_value": Tile(64, 64, 4, 2, 168),
    }[kernel]


def _bulk(rows: int, *tensors: Tensor) -> tuple[bool, list[Any]]:
    """Whether the bulk copy engine can read blocks of `rows` rows of all `tensors` [B, H, length, D]; if so their
    descriptors, else the tensors.

    The engine came with compute capability 9.0. It wants multiples of 16 bytes.
    """
    first = tensors[0]
    able = INTERPRETED.value or torch.cuda.get_device_capability(first.device) >= (9, 0)
    if not able or first.dtype == torch.float32 or not all(_aligned(tensor) for tensor in tensors):
        return False, list(tensors)
    block = [1, 1, rows, _padded(first.shape[-1])]
    return True, [TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x in tensors]


def _aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in tensor.stride()[:-1])


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _heads_inside(x: Tensor, length: int) -> Tensor:
    """An empty [B, H, length, D] whose memory is [B, length, H, D], so that merging the heads needs no copy."""
    B, H, _, D = x.shape
    return x.new_empty(B, length, H, D).transpose(1, 2)


def _few_queries(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    ranges: VisibleRanges,
    eps: float,
    scale: float,
    causal: bool,
    documents: bool,
) -> tuple[Tensor, Tensor]:
    """Output and statistics for a few queries against a long cache: a program for each block of keys, not of queries.

    The scores [B, H, T, S] are few here; the row kernels solve them, and one product with the values ends it.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    scores = query.new_empty((B, H, T, S), dtype=torch.float32)
    few_scores_kernel[triton.cdiv(S, 64), B * G](
        query, key, ranges.first, ranges.last, scores, scale, *query.stride()[:3], *key.stride()[:3], G, H // G, T, S,
        D=D, BLOCK_D=_padded(D), BLOCK_M=max(16, triton.next_power_of_2(H // G * T)), BLOCK_N=64,
        CAUSAL=causal, RANGES=documents, num_warps=4,
    )  # fmt: skip
    weights, (shift, peak) = exact_forward(scores.view(-1, S), budget.view(-1), eps)
    weights = weights.to(value.dtype).view(B, G, H // G * T, S)
    output = _heads_inside(query, T).copy_((weights @ value).view(B, H, T, D))
    covered = shift <= torch.finfo(shift.dtype).min
    stats = torch.stack((
        torch.where(covered, 0.0, shift / scale),
        torch.where(covered, BEYOND.value, peak.log2()),
        torch.zeros_like(shift),  # margin and mass are for a backward, which this has not
        torch.zeros_like(shift),
    ))  # fmt: skip
    return output, stats.view(4, B, H, T)


def _ranges(documents: Tensor | None, query: Tensor, causal: bool) -> VisibleRanges:
    """Of packed documents; elsewhere the kernels compute the ranges and read none of these."""
    if documents is None:
        return VisibleRanges(query, query, query, query)
    return visible_ranges(documents, query.shape[2], causal)


def _factor(eps: float, scale: float) -> float:
    """From q·k to powers of two."""
    return scale / eps * math.log2(math.e)


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
    """Output [B, H, T, D]; statistics [4, B, H, T] float32, see `solve_kernel`; and one of two for the backward:

    capped leaders [B, H, T] int32 if `at_most_two`, which says that no k exceeds 2 (rows where one does are NaN); else
    the free entries' part of the output [B, H, T, D], if `trained` and in half precision. The other is empty.

    query [B, H, T, D]; key, value [B, G, S, D] with H a multiple of G, all of one dtype (float32, bf16, fp16) and
    contiguous in the last dimension; budget [B, H, T] float32; documents [B, S] or None; scale > 0.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    budget = budget.contiguous()
    stats = budget.new_empty(4, B, H, T)
    output, leaders, free_output = _outputs(query, at_most_two, trained)
    if not output.numel():
        return output, stats, leaders, free_output
    ranges = _ranges(documents, query, causal)
    factor = _factor(eps, scale)
    sizes = (H, H // G, T, S, B * H * T)
    strides = (*query.stride()[:3], *key.stride()[:3])
    if T <= FEW_QUERIES and not trained:
        with torch.cuda.device_of(query):
            output, stats = _few_queries(query, key, value, budget, ranges, eps, scale, causal, documents is not None)
        return output, stats, leaders, free_output
    with torch.cuda.device_of(query):
        if at_most_two:
            this = tile("leader", D, query.dtype)
            bulk, (keys,) = _bulk(this.keys, key)
            leader_kernel[triton.cdiv(T, this.queries), B * H](
                query, keys, key, ranges.first, ranges.last, stats, leaders, *strides, *sizes,
                CLASSES=min(64, this.keys), STEP=this.step, BULK=bulk, **this.options(D, causal, documents),
            )  # fmt: skip
            this = tile("follower", D, query.dtype)
            bulk, (keys, values) = _bulk(this.keys, key, value)
            follower_kernel[triton.cdiv(T, this.queries), B * H](
                query, keys, values, value, budget, ranges.first, ranges.last, output, stats, leaders, factor,
                *strides, *value.stride()[:3], *output.stride()[:3], *sizes,
                BULK=bulk, **this.options(D, causal, documents),
            )  # fmt: skip
            return output, stats, leaders, free_output
        this = tile("solve", D, query.dtype)
        bulk, (keys,) = _bulk(this.keys, key)
        solve_kernel[triton.cdiv(T, this.queries), B * H](
            query, keys, budget, ranges.first, ranges.last, stats, factor, *strides, *sizes,
            BULK=bulk, **this.options(D, causal, documents),
        )  # fmt: skip
        split = free_output.numel() > 0
        this = tile("split" if split else "output", D, query.dtype)
        bulk, (keys, values) = _bulk(this.keys, key, value)
        output_kernel[triton.cdiv(T, this.queries), B * H](
            query, keys, values, stats, ranges.first, ranges.last, output, free_output, factor,
            *strides, *value.stride()[:3], *output.stride()[:3], *sizes,
            SPLIT=split, BULK=bulk, **this.options(D, causal, documents),
        )  # fmt: skip
    return output, stats, leaders, free_output


def _outputs(query: Tensor, at_most_two: bool, trained: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors for output, leaders and the free part of the output, as `fused_attention` returns them."""
    T = query.shape[2]
    leaders = query.new_empty(query.shape[:3] if at_most_two else 0, dtype=torch.int32)
    split = trained and not at_most_two and query.dtype != torch.float32
    return _heads_inside(query, T), leaders, _heads_inside(query, T) if split else query.new_empty(0)


@fused_attention.register_fake
def _(
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
    output, leaders, free_output = _outputs(query, at_most_two, trained)
    return output, budget.new_empty(4, *query.shape[:3]), leaders, free_output


@torch.library.custom_op("cda::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summed: Tensor,
    stats: Tensor,
    leaders: Tensor,
    documents: Tensor | None,
    eps: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, each in its dtype, and of the budget [B, H, T] float32.

    `summed` is the output where there are leaders, and its free part elsewhere (in float32 it is not read).
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    grad_query, grad_key, grad_value = _heads_inside(query, T), _heads_inside(key, S), _heads_inside(value, S)
    grad_budget = stats.new_empty(B, H, T)
    if not grad_query.numel():
        return grad_query, grad_key.zero_(), grad_value.zero_(), grad_budget
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    ranges = _ranges(documents, query, causal)
    factor, unit = _factor(eps, scale), scale / eps
    length = triton.cdiv(T, 4) * 4  # the bulk copy engine wants rows of multiples of 16 bytes
    duals = stats.new_empty(4, B, H, length)
    parts = (duals.stride(0), length)
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_output.stride()[:3])
    find_delta = query.dtype == torch.float32
    with torch.cuda.device_of(query):
        dual_kernel[triton.cdiv(T, 64), B * H](
            grad_output, summed, value, stats, leaders, duals, grad_budget, factor,
            *grad_output.stride()[:3], *summed.stride()[:3], *value.stride()[:3], length, H, H // G, T, B * H * T,
            D=D, BLOCK_D=_padded(D), BLOCK_M=64, LEADERS=leaders.numel() > 0, FIND_DELTA=find_delta, num_warps=4,
        )  # fmt: skip
        this = tile("query", D, query.dtype)
        bulk, (keys, values) = _bulk(this.keys, key, value)
        query_kernel[triton.cdiv(T, this.queries), B * H](
            query, keys, values, grad_output, duals, grad_budget, ranges.first, ranges.last, grad_query, factor, unit,
            *strides, *grad_query.stride()[:3], *parts, H, H // G, T, S,
            FIND_DELTA=find_delta, BULK=bulk, **this.options(D, causal, documents),
        )  # fmt: skip
        this = tile("key_value", D, query.dtype)
        bulk, (queries, grads) = _bulk(this.queries, query, grad_output)
        if bulk:
            duals = TensorDescriptor(duals, [4 * B * H, T], [length, 1], [1, this.queries])
        key_value_kernel[triton.cdiv(S, this.keys), B * G](
            queries, key, value, grads, duals, *ranges, grad_key, grad_value, factor, unit,
            *strides, *grad_key.stride()[:3], *grad_value.stride()[:3], *parts, G, H // G, T, S,
            BULK=bulk, **this.options(D, causal, documents),
        )  # fmt: skip
    return grad_query, grad_key, grad_value, grad_budget


@fused_attention_backward.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    summed: Tensor,
    stats: Tensor,
    leaders: Tensor,
    documents: Tensor | None,
    eps: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S = key.shape[2]
    grads = _heads_inside(query, query.shape[2]), _heads_inside(key, S), _heads_inside(value, S)
    return (*grads, stats.new_empty(query.shape[:3]))


def threshold(stats: Tensor, eps: float, scale: float) -> Tensor:
    """a [B, H, T] from the statistics; +inf where k covers all that the query sees."""
    shift, peak = stats[0], stats[1]
    return torch.where(peak >= BEYOND.value, torch.inf, eps * math.log(2) * peak - scale * shift)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    query, key, value, _, documents, *ctx.settings = inputs
    result, stats, leaders, free_output = output
    summed = free_output if free_output.numel() else result
    ctx.save_for_backward(query, key, value, summed, stats, leaders, documents)


def _backward(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Any, ...]:
    eps, scale, causal, _, _ = ctx.settings
    grads = fused_attention_backward(grad_output, *ctx.saved_tensors, eps, scale, causal)
    return (*grads, None, *(None for _ in ctx.settings))


fused_attention.register_autograd(_backward, setup_context=_save)
