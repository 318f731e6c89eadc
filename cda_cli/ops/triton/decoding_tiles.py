"""Decoding of several queries that share their keys, and of any k up to 16: a tile of queries and a split of keys.

The *members* of a tile are the queries of a group (the query heads that share a key head, times T). A program

1. computes the scores of its members and keys, which it writes to memory: 4 bytes for each, where the keys have
   hundreds;
2. solves each member's problem on these keys alone. The keys of the other splits can only lower the weights, so what is
   free here is free in the whole. A score that is capped here is kept out of the sums, with its value row;
3. sums the values under exponentials whose shift is now known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decoding_pieces import is_last, load_budgets, merge, share_of_split, solve, totals_of, vectors_of, visible_keys
from .tiles import SIZES, load_tile, product, rounded


@triton.jit
def keep_capped(
    scores, parts, rows, exists, k, split, active, splits, rows_total, low, value, stride_vs, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Solves `rows` [R] on the scores [R, LENGTH] of a split, and stores what it keeps, and the other total.

    Key j of the split is key low + j of `value`. Returns the shift of the others, and the least score that is kept.
    """
    columns = tl.arange(0, LENGTH)
    exist = exists[:, None] & (scores > float("-inf"))
    capped, shift, _ = solve(scores, exist.to(tl.float32), exist, k, factor, C)
    weights = tl.where(capped, 0.0, tl.exp2((scores - shift[:, None]) * factor))
    place = rows.to(tl.int64)
    tl.store(totals_of(parts, rows_total, splits, C) + place * splits + split, tl.sum(weights, 1), mask=exists)
    P = splits * (1 + C)
    tl.store(parts + place * P + split, shift, mask=exists)
    if C > 0:
        channels, slots = tl.arange(0, BLOCK_D), tl.arange(0, C)
        first = active + split * C
        left = tl.where(capped, scores, float("-inf"))
        most = tl.max(tl.sum(capped.to(tl.int32), 1), 0)
        for number in range(0, most):
            best, column = tl.max(left, 1, return_indices=True)
            left = tl.where(columns[None, :] == column[:, None], float("-inf"), left)
            found = exists & (best > float("-inf"))
            inside = found[:, None] & (channels < D)[None, :]
            v = tl.load(value + (low + column).to(tl.int64)[:, None] * stride_vs + channels[None, :], mask=inside)
            tl.store(parts + place * P + first + number, best, mask=exists)
            vectors = vectors_of(parts, rows_total, splits, C) + (place * P + first + number)[:, None] * D
            tl.store(vectors + channels[None, :], v.to(tl.float32), mask=inside)
        unused = exists[:, None] & (slots >= most)[None, :]
        tl.store(parts + (place * P + first)[:, None] + slots[None, :], float("-inf"), mask=unused)
    return shift, tl.min(tl.where(capped, scores, float("inf")), 1)


@triton.jit(do_not_specialize=(*SIZES, "splits", "scores_length"))
def decode_tile_kernel(
    query, key, value, lengths, budgets, output, parts, arrived,
    budget, factor,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot,
    key_heads, group, T, S, rows_total, splits, scores_length,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, C: tl.constexpr,
    LENGTH: tl.constexpr, BLOCK_R: tl.constexpr, MERGED: tl.constexpr, PIECES: tl.constexpr, ADDED: tl.constexpr,
    LENGTHS: tl.constexpr, BUDGETS: tl.constexpr,
):  # fmt: skip
    """Writes output [B, H, T, D]. The grid is [splits, B·key_heads·tiles of members].

    Lengths and budgets are as `decode_query_kernel` has them. A split has at most LENGTH keys, a power of two. Behind
    the parts of all splits, `parts` has room for shift and least kept score of each split of a row, and for the scores
    [rows, scores_length], where scores_length ≥ S + BLOCK_N. `arrived` is a zero for each program along the second
    axis, and is zero again at the end. The members are solved BLOCK_R and merged MERGED at a time.
    """
    dtype: tl.constexpr = value.dtype.element_ty
    split = tl.program_id(0)
    members = group * T
    tiles = tl.cdiv(members, BLOCK_M)
    pair = tl.program_id(1) // tiles
    batch, head = pair // key_heads, pair % key_heads
    n = visible_keys(lengths, batch, S, LENGTHS)
    share, active = share_of_split(n, splits, BLOCK_N)
    if split >= active:
        return

    first = tl.program_id(1) % tiles * BLOCK_M
    stop = tl.minimum(first + BLOCK_M, members)
    member = first + tl.arange(0, BLOCK_M)  # heads first
    exists = member < members
    rows = pair * members + member
    channels, columns = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    place = batch.to(tl.int64) * stride_qb + (head * group + member // T).to(tl.int64) * stride_qh
    place += (member % T).to(tl.int64) * stride_qt
    q = tl.load(query + place[:, None] + channels[None, :], mask=exists[:, None] & (channels < D)[None, :], other=0.0)
    visible = tl.where(exists, n - T + member % T + 1, 0)  # Each query sees the keys before it.
    key += batch.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    value += batch.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    vectors = vectors_of(parts, rows_total, splits, C)
    shifts_all = vectors + rows_total.to(tl.int64) * splits * (1 + C) * D
    leasts_all = shifts_all + rows_total.to(tl.int64) * splits
    scores_all = leasts_all + rows_total.to(tl.int64) * splits

    low = split * share
    high = tl.minimum(low + share, n)
    scores_of_rows = scores_all + rows.to(tl.int64) * scores_length
    key += low.to(tl.int64) * stride_ks
    for start in range(low, high, BLOCK_N):
        k = load_tile(key, columns, stride_ks, n - start, D, BLOCK_D, True)
        scores = product(q, tl.trans(k))
        scores = tl.where((start + columns)[None, :] < visible[:, None], scores, float("-inf"))
        tl.store(scores_of_rows[:, None] + (start + columns)[None, :], scores, mask=exists[:, None])
        key += BLOCK_N * stride_ks

    tl.debug_barrier()  # Other threads stored what comes next.
    keys = tl.arange(0, LENGTH)
    for start in range(first, stop, BLOCK_R):
        some = start + tl.arange(0, BLOCK_R)
        given = some < stop
        rows_some = pair * members + some
        in_split = given[:, None] & (low + keys < high)[None, :]
        scores_some = scores_all + rows_some.to(tl.int64)[:, None] * scores_length + (low + keys)[None, :]
        k_some = load_budgets(budgets, budget, rows_some, given, C, BUDGETS)
        shift, least = keep_capped(
            tl.load(scores_some, mask=in_split, other=float("-inf")), parts, rows_some, given, k_some, split, active,
            splits, rows_total, low, value, stride_vs, factor, D, BLOCK_D, C, LENGTH,
        )  # fmt: skip
        tl.store(shifts_all + rows_some.to(tl.int64) * splits + split, shift, mask=given)
        tl.store(leasts_all + rows_some.to(tl.int64) * splits + split, least, mask=given)

    tl.debug_barrier()
    shift = tl.load(shifts_all + rows.to(tl.int64) * splits + split, mask=exists, other=0.0)
    least = tl.load(leasts_all + rows.to(tl.int64) * splits + split, mask=exists, other=float("inf"))
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    value += low.to(tl.int64) * stride_vs
    for start in range(low, high, BLOCK_N):
        v = load_tile(value, columns, stride_vs, n - start, D, BLOCK_D, True)
        scores = tl.load(
            scores_of_rows[:, None] + (start + columns)[None, :], mask=exists[:, None], other=float("-inf")
        )
        weights = tl.where(scores >= least[:, None], 0.0, tl.exp2((scores - shift[:, None]) * factor))
        sums += product(rounded(weights, dtype), v)
        value += BLOCK_N * stride_vs
    place_v = (rows.to(tl.int64) * (splits * (1 + C)) + split) * D
    tl.store(vectors + place_v[:, None] + channels[None, :], sums, mask=exists[:, None] & (channels < D)[None, :])

    if is_last(arrived + tl.program_id(1), active):
        for start in range(first, stop, MERGED):
            some = start + tl.arange(0, MERGED)
            given = some < stop
            rows_some = pair * members + some
            place_o = batch.to(tl.int64) * stride_ob + (head * group + some // T).to(tl.int64) * stride_oh
            place_o += (some % T).to(tl.int64) * stride_ot
            k_some = load_budgets(budgets, budget, rows_some, given, C, BUDGETS)
            merge(
                parts, rows_some, given, n - T + some % T + 1, k_some, active, splits, rows_total, output + place_o,
                factor, D, BLOCK_D, C, PIECES, ADDED,
            )  # fmt: skip
