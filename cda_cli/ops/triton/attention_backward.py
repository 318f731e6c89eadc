"""Attention backward: δ of each row, then the gradient of the queries, then those of keys and values.

    δ = ⟨∂L/∂o, o_free⟩ / (k − m),   ∂L/∂s = (λ/ε)(g − δ) on the free entries, 0 elsewhere,   g = ∂L/∂o · v

The scores are recomputed; every sum is made by one program in a fixed order, so the result is deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    SIZES,
    head_of,
    load_block,
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
def _delta(
    grad, summed, value, leaders, mass, rows, stride_ot, stride_vs, T, D: tl.constexpr, BLOCK_D: tl.constexpr,
    LEADERS: tl.constexpr,
):  # fmt: skip
    """δ of the rows, 0 where everything visible is capped.

    `summed` is the free part of the output. With LEADERS it is the output itself, from which the value row of a capped
    leader is subtracted here.
    """
    out = load_tile(summed, rows, stride_ot, T, D, BLOCK_D, True).to(tl.float32)
    if LEADERS:
        leader = tl.load(leaders + rows, mask=rows < T, other=-1)
        places = tl.maximum(leader, 0).to(rows.dtype)
        lead_value = load_tile(value, places, stride_vs, T, D, BLOCK_D, False).to(tl.float32)
        out = tl.where((leader >= 0)[:, None], out - lead_value, out)
    return tl.where(mass > 0, tl.sum(grad.to(tl.float32) * out, 1) / tl.where(mass > 0, mass, 1.0), 0.0)


@triton.jit
def _store_duals(duals, total, rows, inside, delta, shift, margin, peak):
    """Writes what the other kernels of a backward need of each query, for `load_duals`."""
    tl.store(duals + rows, delta, mask=inside)
    tl.store(duals + total + rows, shift, mask=inside)
    tl.store(duals + 2 * total + rows, margin, mask=inside)
    tl.store(duals + 3 * total + rows, peak, mask=inside)


@triton.jit
def load_duals(duals, start, T, BLOCK: tl.constexpr):
    """shift, margin, δ and peak of the queries [start, start + BLOCK), with zeros past T.

    `duals` is a pointer and the distance of its four parts. Or it is a descriptor, the row, and that distance in rows;
    the precision is then half, and the peak is not needed.
    """
    if len(duals) == 3:
        delta = duals[0].load([duals[1], start]).reshape(BLOCK)
        shift = duals[0].load([duals[1] + duals[2], start]).reshape(BLOCK)
        margin = duals[0].load([duals[1] + 2 * duals[2], start]).reshape(BLOCK)
        peak = shift
    else:
        rows = start + tl.arange(0, BLOCK)
        inside = rows < T
        delta = tl.load(duals[0] + rows, mask=inside, other=0.0)
        shift = tl.load(duals[0] + duals[1] + rows, mask=inside, other=0.0)
        margin = tl.load(duals[0] + 2 * duals[1] + rows, mask=inside, other=0.0)
        peak = tl.load(duals[0] + 3 * duals[1] + rows, mask=inside, other=0.0)
    return shift, margin, delta, peak


@triton.jit
def _free_tile(
    q,
    grad,
    keys,
    values,
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
    k = load_block(keys, start, stride_ks, S, D, BLOCK_D, BLOCK_N, CHECK)
    v = load_block(values, start, stride_vs, S, D, BLOCK_D, BLOCK_N, CHECK)
    power = powers(product(q, tl.trans(k)), shift[:, None], peak[:, None], factor, k.dtype)
    free = power <= margin[:, None]
    if CHECK:
        free = free & sees(first, last, start + tl.arange(0, BLOCK_N))
    return tl.where(free, tl.exp2(power), 0.0), product(grad, tl.trans(v)), k


@triton.jit
def _query_tile(
    q,
    grad,
    keys,
    values,
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
        q, grad, keys, values, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, factor,
        D, BLOCK_D, BLOCK_N, CHECK,
    )  # fmt: skip
    grad_scores = weights * (grad_weights - delta[:, None])
    return total + product(rounded(grad_scores, k.dtype), k)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    query,
    key,
    value,
    value_rows,
    grad_output,
    summed,
    stats,
    leaders,
    duals,
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
    stride_ob,
    stride_oh,
    stride_ot,
    stride_db,
    stride_dh,
    stride_dt,
    duals_total,
    duals_length,
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
    LEADERS: tl.constexpr,
    FIND_DELTA: tl.constexpr,
    BULK: tl.constexpr,
):
    """Writes grad_query [B, H, T, D] and duals [4, B, H, duals_length] float32.

    The duals are what `key_value_kernel` needs of each query: δ, which is the gradient of the budget, shift as `powers`
    takes it, margin and peak. `unit` = scale/ε.

    With FIND_DELTA a first pass over the keys computes δ from the very numbers from which it is subtracted later.
    float32 needs that: where one weight is nearly all, g − δ is hardly more than the difference of their roundings.
    With BULK, `key` and `value` are descriptors; single rows are read from `value_rows`, the tensor of which `value` is
    the descriptor.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = visible_range(rows, T, S, first_ptr + batch * T, last_ptr + batch * T, CAUSAL, RANGES)
    base_q = query + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    keys = head_of(key, stride_kb, stride_kh, batch, head // group, BULK)
    values = head_of(value, stride_vb, stride_vh, batch, head // group, BULK)
    base_g = grad_output + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    q = load_tile(base_q, rows, stride_qt, T, D, BLOCK_D, True)
    grad = load_tile(base_g, rows, stride_gt, T, D, BLOCK_D, True)
    inside = rows < T
    position = row.to(tl.int64) * T
    shift, peak, margin = load_dual(stats + position + rows, inside, rows_total, factor, q.dtype)
    low, high, full_low, full_high = tile_bounds(first, last, BLOCK_N)
    if FIND_DELTA:
        weighted = tl.zeros([BLOCK_M], tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        for start in range(low, high, BLOCK_N):
            weights, grad_weights, _ = _free_tile(
                q, grad, keys, values, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, factor,
                D, BLOCK_D, BLOCK_N, True,
            )  # fmt: skip
            weighted += tl.sum(weights * grad_weights, 1)
            mass += tl.sum(weights, 1)
        delta = tl.where(mass > 0, weighted / tl.where(mass > 0, mass, 1.0), 0.0)
    else:
        base_o = summed + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
        base_v = value_rows + batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
        mass = tl.load(stats + 3 * rows_total + position + rows, mask=inside, other=0.0)
        delta = _delta(
            grad, base_o, base_v, leaders + position, mass, rows, stride_ot, stride_vs, T, D, BLOCK_D, LEADERS
        )  # fmt: skip
    _store_duals(duals + row.to(tl.int64) * duals_length, duals_total, rows, inside, delta, shift, margin, peak)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if RANGES:
        for start in range(low, tl.minimum(full_low, high), BLOCK_N):
            total = _query_tile(
                q, grad, keys, values, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, delta,
                total, factor, D, BLOCK_D, BLOCK_N, True,
            )  # fmt: skip
    for start in range(full_low, full_high, BLOCK_N):
        total = _query_tile(
            q, grad, keys, values, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, delta,
            total, factor, D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    for start in range(full_high, high, BLOCK_N):
        total = _query_tile(
            q, grad, keys, values, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, delta,
            total, factor, D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    base_d = grad_query + batch.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    store_tile(base_d, rows, stride_dt, T, rounded(total * unit, grad_query.dtype.element_ty), D, BLOCK_D)


@triton.jit(do_not_specialize=(*SIZES, "group"))
def delta_kernel(
    value,
    grad_output,
    summed,
    stats,
    leaders,
    first_ptr,
    duals,
    sums,
    turns,
    factor,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_ob,
    stride_oh,
    stride_ot,
    duals_total,
    duals_length,
    heads,
    group,
    T,
    rows_total,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RANGES: tl.constexpr,
    LEADERS: tl.constexpr,
):
    """Prepares what `in_turn_kernel` works with, for a tile of queries.

    duals as `query_kernel` writes them; sums [B, H, tiles, BLOCK_M·BLOCK_D] float32, zeros; turns [1 + B·H·tiles]
    int32: the number that the first program draws, and the block of BLOCK_N keys that adds to each tile first.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)  # times a stride, more than 2³¹
    inside = rows < T
    position = row.to(tl.int64) * T
    base_g = grad_output + batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh
    base_o = summed + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    base_v = value + batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
    grad = load_tile(base_g, rows, stride_gt, T, D, BLOCK_D, True)
    shift, peak, margin = load_dual(stats + position + rows, inside, rows_total, factor, grad.dtype)
    mass = tl.load(stats + 3 * rows_total + position + rows, mask=inside, other=0.0)
    delta = _delta(grad, base_o, base_v, leaders + position, mass, rows, stride_ot, stride_vs, T, D, BLOCK_D, LEADERS)
    _store_duals(duals + row.to(tl.int64) * duals_length, duals_total, rows, inside, delta, shift, margin, peak)
    tile = row * tl.num_programs(0) + block
    places = tile.to(tl.int64) * (BLOCK_M * BLOCK_D) + tl.arange(0, BLOCK_M * BLOCK_D)
    tl.store(sums + places, tl.zeros([BLOCK_M * BLOCK_D], tl.float32))
    turn = 0
    if RANGES:
        turn = tl.min(tl.load(first_ptr + batch * T + rows, mask=inside, other=2**31 - 1)) // BLOCK_N
    tl.store(turns + 1 + tile, turn)
    if tile == 0:
        tl.store(turns, 0)


@triton.jit(do_not_specialize=SIZES)
def grad_query_kernel(
    sums,
    grad_query,
    unit,
    stride_db,
    stride_dh,
    stride_dt,
    heads,
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Writes grad_query [B, H, T, D] from the sums that `in_turn_kernel` has added up, times `unit`."""
    block, row = tl.program_id(0), tl.program_id(1)
    batch, head = row // heads, row % heads
    rows = tl.arange(0, BLOCK_M)[:, None]
    channels = tl.arange(0, BLOCK_D)[None, :]
    # As `in_turn_kernel` adds them: what a thread has of a block of 16 rows and 8 channels, and of the next block.
    places = rows // 16 * (BLOCK_D * 16) + rows % 8 * 16 + rows % 16 // 8 * 2
    places += channels // 8 * 128 + channels % 8 // 2 * 4 + channels % 2
    tile = (row * tl.num_programs(0) + block).to(tl.int64)
    total = tl.load(sums + tile * (BLOCK_M * BLOCK_D) + places)
    base_d = grad_query + batch.to(tl.int64) * stride_db + head.to(tl.int64) * stride_dh
    rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    store_tile(base_d, rows, stride_dt, T, rounded(total * unit, grad_query.dtype.element_ty), D, BLOCK_D)
