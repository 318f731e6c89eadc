"""The fused attention: the custom operator `cda::fused_attention`, its fake tensors, its gradient and its launches.

Kept for the backward: query, key, value, the free part of the output and four numbers per row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cda_cli.ops.documents import VisibleRanges, visible_ranges
from cda_cli.ops.triton.attention_backward import delta_kernel, key_value_kernel, query_kernel
from cda_cli.ops.triton.attention_forward import few_scores_kernel, output_kernel, solve_kernel
from cda_cli.ops.triton.rows import exact_forward
from cda_cli.ops.triton.tiles import BEYOND

# Up to so many queries are too few for a program per block of queries.
FEW_QUERIES = 4


class Tile(NamedTuple):
    """Queries and keys of a tile, and how Triton compiles the loop over them."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self, width: int, causal: bool, documents: Tensor | None) -> dict[str, Any]:
        """What every kernel over tiles takes by name."""
        shape = {"D": width, "BLOCK_D": _padded(width), "BLOCK_M": self.queries, "BLOCK_N": self.keys}
        sight = {"CAUSAL": causal, "RANGES": documents is not None}
        return shape | sight | {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.registers}


def tile(kernel: str, width: int, dtype: torch.dtype) -> Tile:
    """The tile of each kernel for heads of `width`, as measured on an H200 (docs/kernels.md)."""
    if dtype == torch.float32:
        # Exact float32 products run outside the matrix units and keep both operands in registers.
        return Tile(16, 32, 4, 1) if width > 64 else Tile(32, 32, 4, 1)
    if width > 128:
        return {
            "solve 1": Tile(64, 64, 4, 2),
            "solve 2": Tile(64, 64, 4, 2),
            "output": Tile(64, 64, 4, 2),
            "split": Tile(64, 32, 8, 2),
            "query": Tile(64, 32, 4, 2),
            "key_value": Tile(32, 64, 8, 1),
        }[kernel]
    if width > 64:
        return {
            "solve 1": Tile(64, 64, 4, 3, 168),
            "solve 2": Tile(64, 64, 4, 3),
            "output": Tile(64, 64, 4, 3),
            "split": Tile(64, 64, 4, 3),
            "query": Tile(64, 64, 4, 2),
            "key_value": Tile(32, 64, 4, 3),
        }[kernel]
    return {
        "solve 1": Tile(64, 64, 4, 3, 168),
        "solve 2": Tile(64, 64, 4, 3),
        "output": Tile(64, 64, 4, 3),
        "split": Tile(64, 32, 4, 3),
        "query": Tile(64, 64, 4, 3),
        "key_value": Tile(64, 64, 4, 2),
    }[kernel]


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
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fused_attention`, for a few queries against a long cache: a program for each block of keys, not of queries.

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
    return output, query.new_empty(0), stats.view(4, B, H, T)


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
    depth: int,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, H, T, D], the free entries' part of it (if `trained`, and in half precision only), and statistics.

    query [B, H, T, D]; key, value [B, G, S, D] with H a multiple of G, all of one dtype (float32, bf16, fp16) and
    contiguous in the last dimension; budget [B, H, T] float32; documents [B, S] or None; scale > 0. `depth` is the
    number of scores that each class of keys keeps (1 suffices for k ≤ 2; the result does not depend on it).
    Statistics [4, B, H, T] float32: see `solve_kernel`.
    """
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    budget = budget.contiguous()
    stats = budget.new_empty(4, B, H, T)
    split = trained and query.dtype != torch.float32
    output = _heads_inside(query, T)
    free_output = _heads_inside(query, T) if split else query.new_empty(0)
    if not output.numel():
        return output, free_output, stats
    ranges = _ranges(documents, query, causal)
    factor = _factor(eps, scale)
    sizes = (H, H // G, T, S, B * H * T)
    strides = (*query.stride()[:3], *key.stride()[:3])
    if T <= FEW_QUERIES and not trained:
        with torch.cuda.device_of(query):
            return _few_queries(query, key, value, budget, ranges, eps, scale, causal, documents is not None)
    with torch.cuda.device_of(query):
        this = tile(f"solve {depth}", D, query.dtype)
        solve_kernel[triton.cdiv(T, this.queries), B * H](
            query, key, budget, ranges.first, ranges.last, stats, factor, *strides, *sizes,
            DEPTH=depth, **this.options(D, causal, documents),
        )  # fmt: skip
        this = tile("split" if split else "output", D, query.dtype)
        output_kernel[triton.cdiv(T, this.queries), B * H](
            query, key, value, stats, ranges.first, ranges.last, output, free_output, factor,
            *strides, *value.stride()[:3], *output.stride()[:3], *sizes,
            SPLIT=split, **this.options(D, causal, documents),
        )  # fmt: skip
    return output, free_output, stats


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
    depth: int,
    trained: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    output = _heads_inside(query, query.shape[2])
    free_output = (
        _heads_inside(query, query.shape[2]) if trained and query.dtype != torch.float32 else query.new_empty(0)
    )
    return output, free_output, budget.new_empty(4, *query.shape[:3])


@torch.library.custom_op("cda::fused_attention_backward", mutates_args=())
def fused_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    free_output: Tensor,
    stats: Tensor,
    documents: Tensor | None,
    eps: float,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, each in its dtype, and of the budget [B, H, T] float32."""
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    grad_query, grad_key, grad_value = _heads_inside(query, T), _heads_inside(key, S), _heads_inside(value, S)
    delta = stats.new_empty(B, H, T)
    if not grad_query.numel():
        return grad_query, grad_key.zero_(), grad_value.zero_(), delta
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    ranges = _ranges(documents, query, causal)
    factor, unit = _factor(eps, scale), scale / eps
    rows = B * H * T
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_output.stride()[:3])
    find_delta = not free_output.numel()
    with torch.cuda.device_of(query):
        if not find_delta:
            delta_kernel[triton.cdiv(T, 64), B * H](
                grad_output, free_output, stats, delta, *grad_output.stride()[:3], *free_output.stride()[:3],
                H, T, rows,
                D=D, BLOCK_D=_padded(D), BLOCK_M=64, num_warps=4,
            )  # fmt: skip
        this = tile("query", D, query.dtype)
        query_kernel[triton.cdiv(T, this.queries), B * H](
            query, key, value, grad_output, stats, delta, ranges.first, ranges.last, grad_query, factor, unit,
            *strides, *grad_query.stride()[:3], H, H // G, T, S, rows,
            FIND_DELTA=find_delta, **this.options(D, causal, documents),
        )  # fmt: skip
        this = tile("key_value", D, query.dtype)
        key_value_kernel[triton.cdiv(S, this.keys), B * G](
            query, key, value, grad_output, stats, delta, *ranges, grad_key, grad_value, factor, unit,
            *strides, *grad_key.stride()[:3], *grad_value.stride()[:3], G, H // G, T, S, rows,
            KEYS_DOWN=64 < D <= 128, **this.options(D, causal, documents),
        )  # fmt: skip
    return grad_query, grad_key, grad_value, delta


@fused_attention_backward.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    free_output: Tensor,
    stats: Tensor,
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


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, _, documents, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, output[1], output[2], documents)


def _backward(ctx: Any, grad_output: Tensor, _grad_free: Tensor, _grad_stats: Tensor) -> tuple[Any, ...]:
    eps, scale, causal, _, _ = ctx.settings
    grads = fused_attention_backward(grad_output, *ctx.saved_tensors, eps, scale, causal)
    return (*grads, None, *(None for _ in ctx.settings))


fused_attention.register_autograd(_backward, setup_context=_save)
