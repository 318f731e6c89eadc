"""Decoding where k ≤ 2: a program takes one query and a split of its keys, and reads keys and values once.

Column j of every block of keys is a *slot*. Each slot has an online softmax of its own, and keeps its largest score out
of it, with the value row, until a larger one takes its place. So a block costs no exchange between slots and no branch.
At the end the slots are added up. The largest score of all stays out of the sums: with k ≤ 2 it alone can be capped.

Products are sums over channels. One query would leave the matrix units almost empty.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decoding_pieces import (
    is_last,
    load_budgets,
    merge,
    place_query,
    share_of_split,
    totals_of,
    vectors_of,
    visible_keys,
)
from .tiles import HIDDEN, SIZES, load_tile


@triton.jit(do_not_specialize=(*SIZES, "splits"))
def decode_query_kernel(
    query, key, value, lengths, budgets, output, parts, arrived,
    budget, factor,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot,
    key_heads, group, T, S, rows_total, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr,
    ADDED: tl.constexpr, LENGTHS: tl.constexpr, BUDGETS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes output [B, H, T, D]. The grid is [splits, rows], for the B·H·T rows; C is 1, or 0 for k ≤ 1.

    With LENGTHS, lengths [B] says how many keys a row of the batch has, of S. The k of each query is in budgets
    [B, H, T], or is `budget`. `arrived` is a zero for each row, and is zero again at the end.
    """
    split, row = tl.program_id(0), tl.program_id(1)
    batch, head, t = place_query(row, key_heads * group, T)
    visible = tl.minimum(tl.maximum(visible_keys(lengths, batch, S, LENGTHS) - T + t + 1, 0), S)
    share, active = share_of_split(visible, splits, BLOCK_N)
    if split >= active:
        return

    channels, slots = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    query += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + t.to(tl.int64) * stride_qt
    q = tl.load(query + channels, mask=channels < D, other=0.0).to(tl.float32)
    key += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    value += batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
    shift = tl.full([BLOCK_N], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if C > 0:
        kept = tl.full([BLOCK_N], float("-inf"), tl.float32)
        kept_values = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    low = split * share
    key += low.to(tl.int64) * stride_ks
    value += low.to(tl.int64) * stride_vs
    for start in tl.range(low, tl.minimum(low + share, visible), BLOCK_N, num_stages=STAGES):
        k = load_tile(key, slots, stride_ks, visible - start, D, BLOCK_D, True)
        v = load_tile(value, slots, stride_vs, visible - start, D, BLOCK_D, True).to(tl.float32)
        scores = tl.sum(q[None, :] * k.to(tl.float32), 1)
        scores = tl.where(start + slots < visible, scores, float("-inf"))
        if C > 0:
            enters = scores > kept  # A score that is NaN joins the sums.
            joins, joining = tl.where(enters, kept, scores), tl.where(enters[:, None], kept_values, v)
            kept, kept_values = tl.where(enters, scores, kept), tl.where(enters[:, None], v, kept_values)
        else:
            joins, joining = scores, v
        new_shift = tl.maximum(shift, joins)
        old, weights = tl.exp2((shift - new_shift) * factor), tl.exp2((joins - new_shift) * factor)
        total = total * old + weights
        sums = sums * old[:, None] + weights[:, None] * joining
        shift = new_shift
        key += BLOCK_N * stride_ks
        value += BLOCK_N * stride_vs

    P = splits * (1 + C)
    scores_of_row = parts + row.to(tl.int64) * P
    vectors = vectors_of(parts, rows_total, splits, C) + row.to(tl.int64) * P * D
    inside = channels < D
    largest = tl.max(shift, 0)
    if C > 0:
        best, slot = tl.max(kept, 0, return_indices=True)
        is_best = slots == slot
        others = tl.where(is_best, float("-inf"), kept)
        largest = tl.maximum(largest, tl.max(others, 0))
        joined = tl.exp2((others - largest) * factor)
        tl.store(scores_of_row + active + split, best)
        best_values = tl.sum(tl.where(is_best[:, None], kept_values, 0.0), 0)
        tl.store(vectors + (active + split) * D + channels, best_values, mask=inside)
    weights = tl.exp2((shift - largest) * factor)
    total, sums = total * weights, sums * weights[:, None]
    if C > 0:
        total, sums = total + joined, sums + joined[:, None] * kept_values
    tl.store(scores_of_row + split, largest)
    tl.store(totals_of(parts, rows_total, splits, C) + row.to(tl.int64) * splits + split, tl.sum(total, 0))
    tl.store(vectors + split * D + channels, tl.sum(sums, 0), mask=inside)

    if is_last(arrived + row, active):
        rows = row + tl.arange(0, 1)
        place = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + t.to(tl.int64) * stride_ot
        budget_of_rows = load_budgets(budgets, budget, rows, rows >= 0, C, BUDGETS)
        merge(
            parts, rows, rows >= 0, visible + tl.zeros([1], tl.int32), budget_of_rows, active, splits, rows_total,
            output + place + tl.zeros([1], tl.int64), factor, D, BLOCK_D, C, PIECES, ADDED,
        )  # fmt: skip
