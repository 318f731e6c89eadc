"""Attention backward: δ of each row, then the gradient of the queries, then those of keys and values.

    δ = ⟨∂L/∂o, o_free⟩ / (k − m),   ∂L/∂s = (λ/ε)(g − δ) on the free entries, 0 elsewhere,   g = ∂L/∂o · v

The scores are recomputed; every sum is made by one program in a fixed order, so the result is deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cda_cli.ops.triton.tiles import (
    BEYOND,
    capped_exp2,
    load_dual,
    load_tile,
    powers,
    product,
    rounded,
    sees,
    store_tile,
    tile_bounds,
    visible_range,
)


@triton.jit
def delta_kernel(
    grad_output,
    free_output,
    stats,
    delta,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_ob,
    stride_oh,
    stride_ot,
    heads,
    T,
    rows_total,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta [B, H, T] float32 = ∂L/∂k; 0 where everything visible is capped."""
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    base_g = grad_output + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    base_o = free_output + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    grad = load_tile(base_g, rows, stride_gt, T, D, BLOCK_D, True).to(tl.float32)
    out = load_tile(base_o, rows, stride_ot, T, D, BLOCK_D, True).to(tl.float32)
    place = row.to(tl.int64) * T + rows
    mass = tl.load(stats + 3 * rows_total + place, mask=rows < T, other=0.0)
    value = tl.where(mass > 0, tl.sum(grad * out, 1) / tl.where(mass > 0, mass, 1.0), 0.0)
    tl.store(delta + place, value, mask=rows < T)


@triton.jit
def _free_tile(
    q,
    grad,
    base_k,
    base_v,
    start,
    stride_ks,
    stride_vs,
    S,
    first,
    last,
    shift,
    peak,
    margin,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
):
    """λ of the free entries of one tile of keys (0 elsewhere), g, and the keys."""
    columns = start + tl.arange(0, BLOCK_N)
    k = load_tile(base_k, columns, stride_ks, S, D, BLOCK_D, CHECK)
    v = load_tile(base_v, columns, stride_vs, S, D, BLOCK_D, CHECK)
    power = powers(product(q, tl.trans(k)), shift[:, None], peak[:, None], factor, k.dtype)
    free = power <= margin[:, None]
    if CHECK:
        free = free & sees(first, last, columns)
    return tl.where(free, tl.exp2(power), 0.0), product(grad, tl.trans(v)), k


@triton.jit
def _query_tile(
    q,
    grad,
    base_k,
    base_v,
    start,
    stride_ks,
    stride_vs,
    S,
    first,
    last,
    shift,
    peak,
    margin,
    delta,
    total,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
):
    weights, grad_weights, k = _free_tile(
        q, grad, base_k, base_v, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, factor,
        D, BLOCK_D, BLOCK_N, CHECK,
    )  # fmt: skip
    grad_scores = weights * (grad_weights - delta[:, None])
    return total + product(rounded(grad_scores, k.dtype), k)


@triton.jit
def query_kernel(
    query,
    key,
    value,
    grad_output,
    stats,
    delta,
    first_ptr,
    last_ptr,
    grad_query,
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
    stride_dt,
    heads,
    group,
    T,
    S,
    rows_total,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    FIND_DELTA: tl.constexpr,
):
    """grad_query [B, H, T, D]; `unit` = scale/ε.

    With FIND_DELTA a first pass over the keys makes delta of the very numbers that it is subtracted from, which float32
    needs: where one weight is nearly all, little is left of g − δ but the difference of their roundings.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = visible_range(rows, T, S, first_ptr + batch * T, last_ptr + batch * T, CAUSAL, RANGES)
    base_q = query + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    base_k = key + batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    base_v = value + batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
    base_g = grad_output + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    q = load_tile(base_q, rows, stride_qt, T, D, BLOCK_D, True)
    grad = load_tile(base_g, rows, stride_gt, T, D, BLOCK_D, True)
    place = row.to(tl.int64) * T + rows
    shift, peak, margin = load_dual(stats + place, rows < T, rows_total)
    peak = tl.where(margin < -0.5 * BEYOND, -BEYOND, peak)  # a row that k covers has no free entry

    low, high, full_low, full_high = tile_bounds(first, last, BLOCK_N)
    if FIND_DELTA:
        weighted = tl.zeros([BLOCK_M], tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        for start in range(low, high, BLOCK_N):
            weights, grad_weights, _ = _free_tile(
                q, grad, base_k, base_v, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, factor,
                D, BLOCK_D, BLOCK_N, True,
            )  # fmt: skip
            weighted += tl.sum(weights * grad_weights, 1)
            mass += tl.sum(weights, 1)
        delta_row = tl.where(mass > 0, weighted / tl.where(mass > 0, mass, 1.0), 0.0)
        tl.store(delta + place, delta_row, mask=rows < T)
    else:
        delta_row = tl.load(delta + place, mask=rows < T, other=0.0)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if RANGES:
        for start in range(low, tl.minimum(full_low, high), BLOCK_N):
            total = _query_tile(
                q, grad, base_k, base_v, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, delta_row,
                total, factor, D, BLOCK_D, BLOCK_N, True,
            )  # fmt: skip
    for start in range(full_low, full_high, BLOCK_N):
        total = _query_tile(
            q, grad, base_k, base_v, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, delta_row,
            total, factor, D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    for start in range(full_high, high, BLOCK_N):
        total = _query_tile(
            q, grad, base_k, base_v, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, delta_row,
            total, factor, D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    base_d = grad_query + batch.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    store_tile(base_d, rows, stride_dt, T, rounded(total * unit, grad_query.dtype.element_ty), D, BLOCK_D)


@triton.jit
def _key_tile(
    k,
    v,
    base_q,
    base_g,
    start,
    stride_qt,
    stride_gt,
    columns,
    stats,
    delta,
    first_ptr,
    last_ptr,
    T,
    S,
    rows_total,
    grad_k,
    grad_v,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    KEYS_DOWN: tl.constexpr,
    CHECK: tl.constexpr,
):
    """One tile of queries. Those past T have weight 0 by their peak.

    KEYS_DOWN computes the scores transposed, which spares a turn through shared memory; for narrow heads that is dearer
    than the registers for the numbers of each query, which then lie along the long side.
    """
    rows = start + tl.arange(0, BLOCK_M)
    q = load_tile(base_q, rows, stride_qt, T, D, BLOCK_D, CHECK)
    grad = load_tile(base_g, rows, stride_gt, T, D, BLOCK_D, CHECK)
    inside = rows < T
    shift, peak, margin = load_dual(stats + rows, inside, rows_total)
    delta_row = tl.load(delta + rows, mask=inside, other=0.0)
    if CHECK:
        first, last = visible_range(rows, T, S, first_ptr, last_ptr, CAUSAL, RANGES)
    if KEYS_DOWN:
        power = powers(product(k, tl.trans(q)), shift[None, :], peak[None, :], factor, k.dtype)
        weights = capped_exp2(power)
        if CHECK:
            visible = (columns[:, None] >= first[None, :]) & (columns[:, None] < last[None, :])
            weights = tl.where(visible, weights, 0.0)
        grad_scores = weights * (product(v, tl.trans(grad)) - delta_row[None, :])
        grad_scores = tl.where(power <= margin[None, :], grad_scores, 0.0)
        grad_v += product(rounded(weights, grad.dtype), grad)
        grad_k += product(rounded(grad_scores, q.dtype), q)
    else:
        power = powers(product(q, tl.trans(k)), shift[:, None], peak[:, None], factor, k.dtype)
        weights = capped_exp2(power)
        if CHECK:
            visible = sees(first, last, columns)
            weights = tl.where(visible, weights, 0.0)
        grad_scores = weights * (product(grad, tl.trans(v)) - delta_row[:, None])
        grad_scores = tl.where(power <= margin[:, None], grad_scores, 0.0)
        grad_v += product(tl.trans(rounded(weights, grad.dtype)), grad)
        grad_k += product(tl.trans(rounded(grad_scores, q.dtype)), q)
    return grad_k, grad_v


@triton.jit
def key_value_kernel(
    query,
    key,
    value,
    grad_output,
    stats,
    delta,
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
    key_heads,
    group,
    T,
    S,
    rows_total,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    KEYS_DOWN: tl.constexpr,
):
    """grad_key, grad_value [B, G, S, D], of BLOCK_N keys, summed over the query heads that share them.

    low_ptr, high_ptr [B, S], with RANGES: the queries [low, high) that see each key.
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
        full_low = high  # where documents end inside a tile is not looked for: every tile is checked
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
        base_q = query + batch.to(tl.int64) * stride_qb + query_head.to(tl.int64) * stride_qh
        base_g = grad_output + batch.to(tl.int64) * stride_gb + query_head.to(tl.int64) * stride_gh
        place = (batch.to(tl.int64) * (key_heads * group) + query_head) * T
        for start in range(low, full_low, BLOCK_M):
            grad_k, grad_v = _key_tile(
                k, v, base_q, base_g, start, stride_qt, stride_gt, columns, stats + place, delta + place, first_ptr,
                last_ptr, T, S, rows_total, grad_k, grad_v, factor, D, BLOCK_D, BLOCK_M, CAUSAL, RANGES,
                KEYS_DOWN, True,
            )  # fmt: skip
        for start in range(full_low, full_high, BLOCK_M):
            grad_k, grad_v = _key_tile(
                k, v, base_q, base_g, start, stride_qt, stride_gt, columns, stats + place, delta + place, first_ptr,
                last_ptr, T, S, rows_total, grad_k, grad_v, factor, D, BLOCK_D, BLOCK_M, CAUSAL, RANGES,
                KEYS_DOWN, False,
            )  # fmt: skip
        for start in range(full_high, high, BLOCK_M):
            grad_k, grad_v = _key_tile(
                k, v, base_q, base_g, start, stride_qt, stride_gt, columns, stats + place, delta + place, first_ptr,
                last_ptr, T, S, rows_total, grad_k, grad_v, factor, D, BLOCK_D, BLOCK_M, CAUSAL, RANGES,
                KEYS_DOWN, True,
            )  # fmt: skip
    base_d = grad_key + batch.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    base_e = grad_value + batch.to(tl.int64) * stride_eb + head.to(tl.int64) * stride_eh
    store_tile(base_d, columns, stride_ds, S, rounded(grad_k * unit, grad_key.dtype.element_ty), D, BLOCK_D)
    store_tile(base_e, columns, stride_es, S, rounded(grad_v, grad_value.dtype.element_ty), D, BLOCK_D)
