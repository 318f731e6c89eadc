"""Attention forward for any k, in two passes over the keys and without a T × S tensor.

`solve_kernel` finds the dual of each row; `output_kernel` sums the values under the weights that the dual gives.

The keys form BLOCK_N classes, of which column j of every tile is one. For each row the first pass keeps the two
largest scores of each class as candidates, and sums the others. An insertion takes four comparisons per score, without
a branch and without an exception for ties; a score that falls out of its class joins the sum of its part, 1/8 of the
classes. The largest of a part is a candidate as well. Newton's method on the exponentials of the candidates is exact
if no other score of the sums is capped. If one is (two of a part fell out, or many entries are capped), further passes
over the keys finish the row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_tiles import ONE, SHARP, any_of, exp2, saturated, sums
from .tiles import (
    BEYOND,
    HIDDEN,
    SIZES,
    budget_of,
    capped_exp2,
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
    tile_scores,
    visible_range,
)

HIGHEST = tl.constexpr(100.0)  # The exponent of a candidate whose score is higher.
NEAREST = tl.constexpr(2.0**-80)  # For a smaller y, such a candidate may be free.
FARTHEST = tl.constexpr(2.0**60)  # For a larger y, the exponentials of free candidates may have underflowed.
TINY = tl.constexpr(1e-37)
# The sum of a row has so many parts. On the matrix units one thread holds all keys of a part.
PARTS = tl.constexpr(8)
# The largest score of a part is in its sum and is taken out of it, which costs the sum digits if it weighs more.
HEAVIEST = tl.constexpr(16.0)
# So much of the largest may be missing in the sums of the others.
SLACK = tl.constexpr(PARTS.value * 2.0**-14)


@triton.jit
def _base(shift, factor):
    """The shift in powers of two, and 0 where nothing was seen.

    There the compiler may round one of two equal products of HIDDEN and not the other.
    """
    return tl.where(shift > 0.5 * HIDDEN, shift * factor, 0.0)


@triton.jit
def _parts(x):
    """The sums of x [rows, n] over the classes of a part, [rows, PARTS]."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // PARTS, PARTS]), 1)


@triton.jit
def _largest_of_parts(x):
    """The largest numbers of x [rows, n], which are not negative, over the classes of a part, [rows, PARTS].

    Such numbers are in the order of their bits, and of integers an instruction compares three.
    """
    bits = tl.reshape(x.to(tl.int32, bitcast=True), [x.shape[0], x.shape[1] // PARTS, PARTS])
    return tl.max(bits, 1).to(tl.float32, bitcast=True)


@triton.jit
def _insert(
    q,
    keys,
    start,
    stride,
    S,
    first,
    last,
    top,
    second,
    total,
    third,
    shift,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BORDER: tl.constexpr,
):
    """Inserts a tile of keys into the classes, whose two candidates are top ≥ second.

    Scores that fall out join the sum of their part, `total` [BLOCK_M, PARTS]; `third` is the largest exponential of it.
    With BORDER some keys may be hidden, and the shift of the sums follows the largest `second`, which no score of them
    exceeds. Without BORDER it stays.
    """
    scores = tile_scores(q, keys, start, stride, S, first, last, D, BLOCK_D, BLOCK_N, BORDER)
    out = tl.minimum(top, scores)
    top = tl.maximum(top, scores)
    rest = tl.minimum(second, out)
    second = tl.maximum(second, out)
    if BORDER:
        new_shift = tl.maximum(shift, tl.max(second, 1))
        alpha = tl.exp2((shift - new_shift) * factor)[:, None]
        total *= alpha
        third *= alpha
        shift = new_shift
    added = tl.exp2(rest * factor - _base(shift, factor)[:, None])
    bits = tl.maximum(third.to(tl.int32, bitcast=True), _largest_of_parts(added).to(tl.int32, bitcast=True))
    return top, second, total + _parts(added), bits.to(tl.float32, bitcast=True), shift


@triton.jit
def _refine(
    q,
    keys,
    start,
    stride,
    S,
    first,
    last,
    cut,
    count,
    largest,
    total,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Adds a tile to a Newton pass: how many scores exceed `cut`, the largest of the others, and their sum."""
    scores = tile_scores(q, keys, start, stride, S, first, last, D, BLOCK_D, BLOCK_N, CHECK)
    capped = saturated(scores, SHARP * factor, -(cut * SHARP)[:, None])  # 1 or 0, without a comparison
    count += tl.sum(capped, 1)
    scores += capped * HIDDEN
    shift = tl.maximum(largest, tl.max(scores, 1))
    added = tl.sum(tl.exp2(scores * factor - _base(shift, factor)[:, None]), 1)
    return count, shift, total * tl.exp2((largest - shift) * factor) + added


@triton.jit
def _free(e, y):
    """1 where y·e [rows, n] is not above 1 to rounding, and else 0."""
    return saturated(e, -(y * (SHARP / ONE))[:, None], SHARP)


@triton.jit
def _free_near(scores, e, y, centre, factor):
    """The sum of exp2((s − centre)·factor) over those `scores` [rows, n] that y does not cap, where e is theirs."""
    return tl.sum(_free(e, y) * exp2(tl.minimum((scores - centre[:, None]) * factor, 1.0)), 1)


@triton.jit(do_not_specialize=SIZES)
def solve_kernel(
    query,
    key,
    budget,
    first_ptr,
    last_ptr,
    stats,
    factor,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    heads,
    group,
    T,
    S,
    rows_total,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EACH: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    BULK: tl.constexpr,
):
    """Writes stats [4, B, H, T] float32: shift, as q·k; peak and margin, in powers of two; mass = k − m.

    λ = exp2(min(0, y)) with y = factor·(q·k − shift) + peak, and an entry is capped if y > margin. The margin is the
    threshold that separated capped from free entries when the last entry was capped. It lies further from both than
    the rounding of the scores in the backward.
    """
    # The last queries of a causal sequence see the most keys, so they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = visible_range(rows, T, S, first_ptr + batch * T, last_ptr + batch * T, CAUSAL, RANGES)
    base_q = query + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    keys = head_of(key, stride_kb, stride_kh, batch, head // group, BULK)
    q = load_tile(base_q, rows, stride_qt, T, D, BLOCK_D, True)
    place = row.to(tl.int64) * T + rows
    k_row = budget_of(budget, place, rows < T, EACH)

    low, high, full_low, full_high = tile_bounds(first, last, BLOCK_N)
    top = tl.full([BLOCK_M, BLOCK_N], HIDDEN, tl.float32)
    second = tl.full([BLOCK_M, BLOCK_N], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M, PARTS], tl.float32)
    third = tl.zeros([BLOCK_M, PARTS], tl.float32)
    reference = tl.full([BLOCK_M], HIDDEN, tl.float32)
    if RANGES:
        for start in range(low, tl.minimum(full_low, high), BLOCK_N):
            top, second, total, third, reference = _insert(
                q, keys, start, stride_ks, S, first, last, top, second, total, third, reference, factor, D, BLOCK_D,
                BLOCK_N, True,
            )  # fmt: skip
    # The last two whole tiles count as borders: the shift needs some scores to follow.
    border = tl.maximum(full_high - 2 * BLOCK_N, full_low)
    for start in range(border, high, BLOCK_N):
        top, second, total, third, reference = _insert(
            q, keys, start, stride_ks, S, first, last, top, second, total, third, reference, factor, D, BLOCK_D,
            BLOCK_N, True,
        )  # fmt: skip
    for start in range(full_low, border, BLOCK_N):
        top, second, total, third, reference = _insert(
            q, keys, start, stride_ks, S, first, last, top, second, total, third, reference, factor, D, BLOCK_D,
            BLOCK_N, False,
        )  # fmt: skip

    # The exponentials of the candidates are relative to the largest `second`. A few keys may lie far above all others
    # (attention sinks); they are then certainly capped.
    highest, shift = tl.max(top, 1), tl.max(second, 1)
    shift = tl.where(shift > 0.5 * HIDDEN, shift, highest)
    high_exp = exp2(tl.minimum((top - shift[:, None]) * factor, HIGHEST))
    low_exp = exp2(tl.minimum((second - shift[:, None]) * factor, 0.0))
    lost = tl.sum(total, 1) > 1e37  # The sum overflowed.
    half = tl.exp2(0.5 * (reference - shift) * factor)[:, None]  # Its square may underflow where the sum is large.
    others = (total - third) * half * half
    third = third * half * half
    # A part has another capped score only if both exceed 1.
    rest, part, heaviest = tl.sum(others, 1), tl.max(tl.minimum(others, third), 1), tl.max(third, 1)
    # Newton's method on F(y) = Σ min(1, y·e) = k. It starts with nothing capped, and y only grows.
    covered = (last - first).to(tl.float32) <= k_row
    count = tl.zeros([BLOCK_M], tl.float32)
    accepted = tl.zeros([BLOCK_M], tl.float32)
    y = k_row / (tl.sum(_parts(high_exp) + _parts(low_exp) + third, 1) + rest)
    searching = (k_row > 1) & ~covered & ~lost
    while any_of(searching):
        high_free, low_free, third_free = _free(high_exp, y), _free(low_exp, y), _free(third, y)
        left, free = sums(
            _parts(high_free) + _parts(low_free) + third_free,
            _parts(high_free * high_exp) + _parts(low_free * low_exp) + third_free * third,
        )
        reached = 2 * BLOCK_N + PARTS - left
        # If k entries or more are above 1, they are all 1 to rounding, and none of them is capped.
        searching = searching & (reached > count) & (reached < k_row)
        accepted = tl.where(searching, y, accepted)
        count = tl.where(searching, reached, count)
        y = tl.where(searching, (k_row - reached) / tl.maximum(free + rest, TINY), y)
        searching = searching & (y < FARTHEST)

    # A row starts again where its sum overflowed, or its threshold is out of reach of the exponentials.
    lost = lost | (y >= FARTHEST) | ((y <= NEAREST) & ((highest - shift) * factor > HIGHEST))
    count = tl.where(lost, 0.0, count)
    shift = tl.where(lost, highest, shift)
    gap = tl.log2(y) - tl.log2(accepted)
    # A score of the sums is not above its part of them, nor above any `second`.
    heavy = y * heaviest > HEAVIEST
    going = (lost | heavy | ((y > 1) & (y * part > 1) & (count + 1 < k_row))) & ~covered
    # What a heavy one may have cost the sums makes y too large, and a further pass needs one that is not.
    safe = tl.where(heavy, 1 / (1 + y * heaviest * SLACK / (k_row - count)), 1.0)
    if q.dtype == tl.float32:
        # An exponent of 32 has a rounding error of 2⁻²⁰, which float32 would show. The last step is taken anew with
        # exponents relative to the threshold, which are small where weights are not.
        centre = tl.where(lost, shift, shift - tl.log2(y) / factor)
        free = _free_near(top, high_exp, y, centre, factor) + _free_near(second, low_exp, y, centre, factor)
        near = free + (rest + tl.sum(_free(third, y) * third, 1)) * tl.exp2((shift - centre) * factor)
        y = tl.where(lost, y, (k_row - count) / tl.maximum(near, TINY))
        shift = centre
    level = tl.log2(tl.where(lost, k_row / (last - first + 1).to(tl.float32), y * safe))
    offset = level - shift * factor
    cut = tl.where(count > 0, gap - offset, BEYOND)
    # Rows with a capped entry outside the candidates take the same step over all keys.
    while any_of(going):
        new_count = tl.zeros([BLOCK_M], tl.float32)
        largest_row = tl.full([BLOCK_M], HIDDEN, tl.float32)
        free = tl.zeros([BLOCK_M], tl.float32)
        for start in range(low, full_low, BLOCK_N):
            new_count, largest_row, free = _refine(
                q, keys, start, stride_ks, S, first, last, -offset, new_count, largest_row, free, factor, D,
                BLOCK_D, BLOCK_N, True,
            )  # fmt: skip
        for start in range(full_low, full_high, BLOCK_N):
            new_count, largest_row, free = _refine(
                q, keys, start, stride_ks, S, first, last, -offset, new_count, largest_row, free, factor, D,
                BLOCK_D, BLOCK_N, False,
            )  # fmt: skip
        for start in range(full_high, high, BLOCK_N):
            new_count, largest_row, free = _refine(
                q, keys, start, stride_ks, S, first, last, -offset, new_count, largest_row, free, factor, D,
                BLOCK_D, BLOCK_N, True,
            )  # fmt: skip
        going, previous = going & (new_count < k_row), offset
        cut = tl.where(going, tl.where(new_count > 0, -offset, BEYOND), cut)
        count = tl.where(going, new_count, count)
        shift = tl.where(going, largest_row, shift)
        level = tl.where(going, tl.log2((k_row - new_count) / free), level)
        offset = level - shift * factor
        going = going & (offset > previous) & (shift * factor + offset > 0) & (count + 1 < k_row)

    margin = tl.where(count > 0, cut + offset, BEYOND)
    inside = rows < T
    tl.store(stats + place, tl.where(covered, 0.0, shift), mask=inside)
    tl.store(stats + rows_total + place, tl.where(covered, BEYOND, level), mask=inside)
    tl.store(stats + 2 * rows_total + place, tl.where(covered, -BEYOND, margin), mask=inside)
    tl.store(stats + 3 * rows_total + place, tl.where(covered, 0.0, k_row - count), mask=inside)


@triton.jit
def _accumulate(
    q,
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
    free,
    capped,
    factor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Adds a tile of values under their weights. With SPLIT, those of the capped entries are added to `capped`."""
    columns = start + tl.arange(0, BLOCK_N)
    k = load_block(keys, start, stride_ks, S, D, BLOCK_D, BLOCK_N, CHECK)
    v = load_block(values, start, stride_vs, S, D, BLOCK_D, BLOCK_N, CHECK)
    power = powers(product(q, tl.trans(k)), shift[:, None], peak[:, None], factor, k.dtype)
    if CHECK:
        visible = sees(first, last, columns)
        power = tl.where(visible, power, -BEYOND)
    weights = capped_exp2(power)
    if SPLIT:
        ones = saturated(power, SHARP, -(margin * SHARP)[:, None])  # 1 where capped, else 0, without a comparison
        if CHECK:  # The margin of a row whose weights are all 1 lies below every power.
            ones = tl.where(visible, ones, 0.0)
        free += product(rounded(weights - ones, v.dtype), v)
        capped += product(rounded(ones, v.dtype), v)
    else:
        free += product(rounded(weights, v.dtype), v)
    return free, capped


@triton.jit(do_not_specialize=SIZES)
def output_kernel(
    query,
    key,
    value,
    stats,
    first_ptr,
    last_ptr,
    output,
    free_output,
    factor,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_ob,
    stride_oh,
    stride_ot,
    heads,
    group,
    T,
    S,
    rows_total,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    BULK: tl.constexpr,
):
    """Writes output [B, H, T, D] = Σ λ v. With SPLIT it also writes free_output, the part of the free entries."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = visible_range(rows, T, S, first_ptr + batch * T, last_ptr + batch * T, CAUSAL, RANGES)
    base_q = query + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    keys = head_of(key, stride_kb, stride_kh, batch, head // group, BULK)
    values = head_of(value, stride_vb, stride_vh, batch, head // group, BULK)
    q = load_tile(base_q, rows, stride_qt, T, D, BLOCK_D, True)
    place = row.to(tl.int64) * T + rows
    shift, peak, margin = load_dual(stats + place, rows < T, rows_total, factor, q.dtype)

    low, high, full_low, full_high = tile_bounds(first, last, BLOCK_N)
    free = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    capped = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if RANGES:
        for start in range(low, tl.minimum(full_low, high), BLOCK_N):
            free, capped = _accumulate(
                q, keys, values, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, free, capped,
                factor, D, BLOCK_D, BLOCK_N, SPLIT, True,
            )  # fmt: skip
    for start in range(full_low, full_high, BLOCK_N):
        free, capped = _accumulate(
            q, keys, values, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, free, capped,
            factor, D, BLOCK_D, BLOCK_N, SPLIT, False,
        )  # fmt: skip
    for start in range(full_high, high, BLOCK_N):
        free, capped = _accumulate(
            q, keys, values, start, stride_ks, stride_vs, S, first, last, shift, peak, margin, free, capped,
            factor, D, BLOCK_D, BLOCK_N, SPLIT, True,
        )  # fmt: skip

    place_o = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    if SPLIT:
        store_tile(free_output + place_o, rows, stride_ot, T, rounded(free, free_output.dtype.element_ty), D, BLOCK_D)
        free += capped
    store_tile(output + place_o, rows, stride_ot, T, rounded(free, output.dtype.element_ty), D, BLOCK_D)
