"""Attention forward for k ≤ 2. It takes two passes over the keys, one of them with exponentials, and no T × S tensor.

With k ≤ 2 at most one entry of a row can be capped: its largest, the *leader*. The first pass finds the leader, its
position, and the largest of the other scores, by a product and two or three comparisons per score. The second pass is
flash attention with a shift that is known beforehand, the largest of the other scores, so it rescales nothing. It holds
the weights to 1. Only the leader would exceed 1, so the leader can be subtracted from both sums again, and the rest is
never small beside it. These sums give the dual in closed form (docs/operator.md). The value row of the leader is then
added under its own weight.

Ties need no exception: the leader is one key, by its position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    BEYOND,
    HIDDEN,
    SIZES,
    budget_of,
    capped_exp2,
    combined,
    head_of,
    load_block,
    load_tile,
    powers,
    product,
    rounded,
    store_tile,
    tile_bounds,
    tile_scores,
    visible_range,
)


@triton.jit
def _fold(scores, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CLASSES: tl.constexpr):
    """The largest score of each class of a tile, [BLOCK_M, CLASSES]. Key j is of class j modulo CLASSES."""
    return tl.max(tl.reshape(scores, [BLOCK_M, BLOCK_N // CLASSES, CLASSES]), 1)


@triton.jit
def _lead(folded, start, top, place, second):
    """Updates the largest scores `top` of the classes, and the starts of the tiles from which they came.

    Of the scores that are displaced or kept out, only the largest remains, in `second`.
    """
    second = tl.maximum(second, tl.max(tl.minimum(folded, top), 1))
    higher = folded > top
    return tl.where(higher, folded, top), tl.where(higher, start, place), second


@triton.jit
def _accumulate(
    q, keys, values, start, stride_ks, stride_vs, S, first, last, shift, factor, total, weighted,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Adds the exponentials of a tile, held to 1, to `total`, and the value rows under them to `weighted`."""
    scores = tile_scores(q, keys, start, stride_ks, S, first, last, D, BLOCK_D, BLOCK_N, CHECK)
    v = load_block(values, start, stride_vs, S, D, BLOCK_D, BLOCK_N, CHECK)
    weights = capped_exp2(powers(scores, shift[:, None], 0.0, factor, v.dtype))
    return total + tl.sum(weights, 1), weighted + product(rounded(weights, v.dtype), v)


@triton.jit(do_not_specialize=SIZES)
def leader_kernel(
    query,
    key,
    key_rows,
    first_ptr,
    last_ptr,
    stats,
    leaders,
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
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    BULK: tl.constexpr,
):
    """Writes the leaders and the first two of the four stats of each row; all are 0 where nothing is seen.

    leaders [B, H, T] int32 are the positions of the largest scores. stats [4, B, H, T] float32 get the largest of the
    other scores and the score of the leader, as q·k.

    Keys that lie a multiple of CLASSES apart are of one class. A step of the loop takes STEP tiles and keeps only the
    largest score of each class. At the end the kernel looks up which key that was, and the second largest score of its
    step. `key_rows` is the tensor of which `key` may be the descriptor.
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
    low, high, full_low, full_high = tile_bounds(first, last, BLOCK_N)
    top = tl.full([BLOCK_M, CLASSES], HIDDEN, tl.float32)
    place = tl.zeros([BLOCK_M, CLASSES], tl.int32)
    second = tl.full([BLOCK_M], HIDDEN, tl.float32)
    if RANGES:
        for start in range(low, tl.minimum(full_low, high), BLOCK_N):
            scores = tile_scores(q, keys, start, stride_ks, S, first, last, D, BLOCK_D, BLOCK_N, True)
            top, place, second = _lead(_fold(scores, BLOCK_M, BLOCK_N, CLASSES), start, top, place, second)
    whole = full_low + (full_high - full_low) // (STEP * BLOCK_N) * (STEP * BLOCK_N)
    for start in range(full_low, whole, STEP * BLOCK_N):
        scores = tile_scores(q, keys, start, stride_ks, S, first, last, D, BLOCK_D, BLOCK_N, False)
        folded = _fold(scores, BLOCK_M, BLOCK_N, CLASSES)
        for tile in tl.static_range(1, STEP):
            scores = tile_scores(
                q, keys, start + tile * BLOCK_N, stride_ks, S, first, last, D, BLOCK_D, BLOCK_N, False
            )  # fmt: skip
            folded = tl.maximum(folded, _fold(scores, BLOCK_M, BLOCK_N, CLASSES))
        top, place, second = _lead(folded, start, top, place, second)
    for start in range(whole, high, BLOCK_N):
        scores = tile_scores(q, keys, start, stride_ks, S, first, last, D, BLOCK_D, BLOCK_N, True)
        top, place, second = _lead(_fold(scores, BLOCK_M, BLOCK_N, CLASSES), start, top, place, second)

    classes = tl.arange(0, CLASSES)
    largest = tl.max(top, 1)
    leading = tl.min(tl.where(top == largest[:, None], classes[None, :], CLASSES - 1), 1)
    is_leading = classes[None, :] == leading[:, None]
    second = tl.maximum(second, tl.max(tl.where(is_leading, HIDDEN, top), 1))
    leader = tl.sum(tl.where(is_leading, place, 0), 1) + leading
    if STEP * BLOCK_N > CLASSES:
        # Looks up which key of its step the leader is, and the largest score of the others there.
        candidate = leader
        best = tl.full([BLOCK_M], HIDDEN, tl.float32)
        q = load_tile(base_q, rows, stride_qt, T, D, BLOCK_D, True).to(tl.float32)
        base_k = key_rows + batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
        for _ in tl.static_range(STEP * BLOCK_N // CLASSES):
            k = load_tile(base_k, candidate, stride_ks, last, D, BLOCK_D, True).to(tl.float32)
            score = tl.where((candidate >= first) & (candidate < last), tl.sum(q * k, 1), HIDDEN)
            second = tl.maximum(second, tl.minimum(score, best))
            leader = tl.where(score > best, candidate, leader)
            best = tl.maximum(best, score)
            candidate += CLASSES
    second = tl.where(second > 0.5 * HIDDEN, tl.minimum(second, largest), largest)
    seen = last > first
    inside = rows < T
    position = row.to(tl.int64) * T + rows
    tl.store(leaders + position, tl.minimum(leader, S - 1), mask=inside)
    tl.store(stats + position, tl.where(seen, second, 0.0), mask=inside)
    tl.store(stats + rows_total + position, tl.where(seen, largest, 0.0), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def leader_output_kernel(
    query,
    key,
    value,
    value_rows,
    budget,
    first_ptr,
    last_ptr,
    output,
    stats,
    leaders,
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
    EACH: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    BULK: tl.constexpr,
):
    """Writes output [B, H, T, D], stats [4, B, H, T] as `solve_kernel` does, and leaders [B, H, T] int32.

    It reads what `leader_kernel` left in stats and leaders. A leader that is not capped becomes −1. A row whose k
    exceeds 2, or is not above 0, is NaN. With BULK, `key` and `value` are descriptors; single rows are read from
    `value_rows`, the tensor of which `value` is the descriptor.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tl.program_id(1)
    batch, head = row // heads, row % heads
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = visible_range(rows, T, S, first_ptr + batch * T, last_ptr + batch * T, CAUSAL, RANGES)
    base_q = query + batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    keys = head_of(key, stride_kb, stride_kh, batch, head // group, BULK)
    values = head_of(value, stride_vb, stride_vh, batch, head // group, BULK)
    q = load_tile(base_q, rows, stride_qt, T, D, BLOCK_D, True)
    low, high, full_low, full_high = tile_bounds(first, last, BLOCK_N)
    inside = rows < T
    position = row.to(tl.int64) * T + rows
    leader = tl.load(leaders + position, mask=inside, other=0)
    shift = tl.load(stats + position, mask=inside, other=0.0)
    largest = tl.load(stats + rows_total + position, mask=inside, other=0.0)
    added = combined(shift, 0.0, factor, q.dtype)

    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if RANGES:
        for start in range(low, tl.minimum(full_low, high), BLOCK_N):
            total, weighted = _accumulate(
                q, keys, values, start, stride_ks, stride_vs, S, first, last, added, factor, total, weighted,
                D, BLOCK_D, BLOCK_N, True,
            )  # fmt: skip
    for start in range(full_low, full_high, BLOCK_N):
        total, weighted = _accumulate(
            q, keys, values, start, stride_ks, stride_vs, S, first, last, added, factor, total, weighted,
            D, BLOCK_D, BLOCK_N, False,
        )  # fmt: skip
    for start in range(full_high, high, BLOCK_N):
        total, weighted = _accumulate(
            q, keys, values, start, stride_ks, stride_vs, S, first, last, added, factor, total, weighted,
            D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip

    seen = last - first
    base_v = value_rows + batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
    lead_value = load_tile(base_v, leader, stride_vs, S, D, BLOCK_D, False).to(tl.float32)
    total = tl.where(total < 1, 0.0, total - 1)
    weighted -= tl.where(seen > 0, 1.0, 0.0)[:, None] * lead_value

    # The dual in powers of two relative to the shift: either all entries are free, or the leader is capped.
    k_row = budget_of(budget, position, inside, EACH)
    k_row = tl.where(k_row > 2, float("nan"), k_row)
    lead = (largest - shift) * factor
    rest = tl.log2(total)
    both = tl.maximum(lead, rest)
    free = tl.log2(k_row) - both - tl.log2(tl.exp2(lead - both) + tl.exp2(rest - both))
    capped = (lead + free > 0) & (k_row > 1)
    covered = seen.to(tl.float32) <= k_row
    peak = tl.where(capped, tl.log2(tl.maximum(k_row - 1, 0.0)) - rest, free)
    lead_weight = tl.where(capped | covered, 1.0, tl.exp2(lead + free))
    lead_weight = tl.where(seen > 0, lead_weight, 0.0)
    mass = tl.where(covered, seen.to(tl.float32), k_row) - lead_weight
    scale = tl.where(total > 0, mass / tl.where(total > 0, total, 1.0), 0.0)
    scale = tl.where(total == total, scale, total)
    weighted = weighted * scale[:, None] + lead_value * lead_weight[:, None]
    base_o = output + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    capped = capped & ~covered
    store_tile(base_o, rows, stride_ot, T, rounded(weighted, output.dtype.element_ty), D, BLOCK_D)
    tl.store(leaders + position, tl.where(capped, leader, -1), mask=inside)
    margin = tl.where(capped, 0.5 * (lead + peak), BEYOND)
    tl.store(stats + position, tl.where(covered, 0.0, shift), mask=inside)
    tl.store(stats + rows_total + position, tl.where(covered, BEYOND, peak), mask=inside)
    tl.store(stats + 2 * rows_total + position, tl.where(covered, -BEYOND, margin), mask=inside)
    tl.store(stats + 3 * rows_total + position, tl.where(covered, 0.0, k_row - tl.where(capped, 1.0, 0.0)), mask=inside)
