"""Attention backward: the gradients of keys and values (attention_backward.py has the mathematics).

A program takes a block of keys and goes over the queries that see them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_backward import load_duals
from .tiles import (
    SIZES,
    capped_exp2,
    head_of,
    load_block,
    load_tile,
    powers,
    product,
    rounded,
    store_tile,
    visible_range,
)


@triton.jit
def _key_tile(
    k,
    v,
    queries,
    grads,
    duals,
    start,
    stride_qt,
    stride_gt,
    columns,
    first_ptr,
    last_ptr,
    T,
    S,
    grad_k,
    grad_v,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Adds a tile of queries, with transposed scores, so that the weights enter the products from registers.

    Queries past T add nothing, since they and the gradients of their outputs are zeros.
    """
    q = load_block(queries, start, stride_qt, T, D, BLOCK_D, BLOCK_M, CHECK)
    grad = load_block(grads, start, stride_gt, T, D, BLOCK_D, BLOCK_M, CHECK)
    shift, margin, delta, peak = load_duals(duals, start, T, BLOCK_M)
    power = powers(product(k, tl.trans(q)), shift[None, :], peak[None, :], factor, k.dtype)
    weights = capped_exp2(power)
    if CHECK:
        first, last = visible_range(start + tl.arange(0, BLOCK_M), T, S, first_ptr, last_ptr, CAUSAL, RANGES)
        visible = (columns[:, None] >= first[None, :]) & (columns[:, None] < last[None, :])
        weights = tl.where(visible, weights, 0.0)
    grad_v += product(rounded(weights, grad.dtype), grad)
    # Select before the product. Beside the rounding the compiler would select in two halves.
    free = tl.where(power <= margin[None, :], weights, 0.0)
    grad_scores = free * (product(v, tl.trans(grad)) - delta[None, :])
    grad_k += product(rounded(grad_scores, q.dtype), q)
    return grad_k, grad_v


@triton.jit(do_not_specialize=SIZES)
def key_value_kernel(
    query,
    key,
    value,
    grad_output,
    duals,
    first_ptr,
    last_ptr,
    low_ptr,
    high_ptr,
    grad_key,
    grad_value,
    factor,
    unit,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_db,
    stride_dh,
    stride_ds,
    stride_eb,
    stride_eh,
    stride_es,
    duals_total,
    duals_length,
    key_heads,
    group,
    T,
    S,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    BULK: tl.constexpr,
):
    """Writes grad_key and grad_value [B, G, S, D] of BLOCK_N keys, summed over the query heads that share them.

    With RANGES, low_ptr and high_ptr [B, S] give the queries [low, high) that see each key.
    """
    row = tl.program_id(1)
    batch, head = row // key_heads, row % key_heads
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    base_k = key + batch.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    base_v = value + batch.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    k = load_tile(base_k, columns, stride_ks, S, D, BLOCK_D, True)
    v = load_tile(base_v, columns, stride_vs, S, D, BLOCK_D, True)
    start_n, stop_n = tl.program_id(0) * BLOCK_N, tl.minimum((tl.program_id(0) + 1) * BLOCK_N, S)
    if RANGES:
        low = tl.min(tl.load(low_ptr + batch * S + columns, mask=columns < S, other=T))
        high = tl.max(tl.load(high_ptr + batch * S + columns, mask=columns < S, other=0))
        full_low = high  # Every tile is checked: the kernel does not look for the ends of documents inside tiles.
    elif CAUSAL:
        low = tl.maximum(start_n - (S - T), 0)
        high = T
        full_low = tl.maximum(stop_n - 1 - (S - T), 0)
    else:
        low, high, full_low = 0, T, 0
    low = low // BLOCK_M * BLOCK_M
    full_low = tl.minimum((full_low + BLOCK_M - 1) // BLOCK_M * BLOCK_M, high)
    full_high = tl.maximum(T // BLOCK_M * BLOCK_M, full_low)
    if RANGES:
        full_high = full_low
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_ptr += batch * T
    last_ptr += batch * T
    for member in range(0, group):
        query_head = head * group + member
        queries = head_of(query, stride_qb, stride_qh, batch, query_head, BULK)
        grads = head_of(grad_output, stride_gb, stride_gh, batch, query_head, BULK)
        query_row = batch * (key_heads * group) + query_head
        if BULK:
            own = (duals, query_row, tl.num_programs(1) * group)
        else:
            own = (duals + query_row.to(tl.int64) * duals_length, duals_total)
        # Without a lower border this loop never runs. Compiled all the same, it crashes ptxas 12.8 and 12.9.
        if CAUSAL or RANGES:
            for start in range(low, full_low, BLOCK_M):
                grad_k, grad_v = _key_tile(
                    k, v, queries, grads, own, start, stride_qt, stride_gt, columns, first_ptr, last_ptr, T, S,
                    grad_k, grad_v, factor, D, BLOCK_D, BLOCK_M, CAUSAL, RANGES, True,
                )  # fmt: skip
        for start in range(full_low, full_high, BLOCK_M):
            grad_k, grad_v = _key_tile(
                k, v, queries, grads, own, start, stride_qt, stride_gt, columns, first_ptr, last_ptr, T, S,
                grad_k, grad_v, factor, D, BLOCK_D, BLOCK_M, CAUSAL, RANGES, False,
            )  # fmt: skip
        for start in range(full_high, high, BLOCK_M):
            grad_k, grad_v = _key_tile(
                k, v, queries, grads, own, start, stride_qt, stride_gt, columns, first_ptr, last_ptr, T, S,
                grad_k, grad_v, factor, D, BLOCK_D, BLOCK_M, CAUSAL, RANGES, True,
            )  # fmt: skip
    base_d = grad_key + batch.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    base_e = grad_value + batch.to(tl.int64) * stride_eb + head.to(tl.int64) * stride_eh
    store_tile(base_d, columns, stride_ds, S, rounded(grad_k * unit, grad_key.dtype.element_ty), D, BLOCK_D)
    store_tile(base_e, columns, stride_es, S, rounded(grad_v, grad_value.dtype.element_ty), D, BLOCK_D)
