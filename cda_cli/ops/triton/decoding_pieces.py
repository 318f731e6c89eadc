"""What the splits of a row of keys leave for each query, and how the last of them adds it up.

The keys that a query sees are dealt out to *splits*, which are programs. A split keeps those scores out of its sums
that may be capped, and gives *pieces*: one for all other scores, and one for each score that it kept. A piece has

    score    the shift of the exponentials in it, or the kept score
    total    Σ exp2((score − shift)·factor) of the scores in it; that of a kept one is 1
    vector   Σ exp2((score − shift)·factor)·value, [D]

C is the most that a split keeps of a query, a power of two or 0: with a budget k ≤ C + 1, fewer than C + 1 scores are
capped. The program of a query that arrives last finds its dual from the pieces of all splits, and adds up the output in
a fixed order.

The parts of row r (B·H·T rows) lie in one memory, float32. With P = splits·(1 + C) they are scores [rows, P], totals
[rows, splits] and vectors [rows, P, D]. Of P numbers the first are those of the active splits, and the next ones those
of the scores that they kept.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import HIDDEN, capped_exp2, rounded, usable


@triton.jit
def vectors_of(parts, rows_total, splits, C: tl.constexpr):
    """The memory of the vectors."""
    return parts + rows_total.to(tl.int64) * splits * (2 + C)


@triton.jit
def totals_of(parts, rows_total, splits, C: tl.constexpr):
    """The memory of the totals."""
    return parts + rows_total.to(tl.int64) * splits * (1 + C)


@triton.jit
def load_budgets(budgets, budget, rows, exists, C: tl.constexpr, BUDGETS: tl.constexpr):
    """The k of each row; NaN for one that this number of kept scores does not serve."""
    k = tl.load(budgets + rows, mask=exists, other=1.0) if BUDGETS else tl.zeros(rows.shape, tl.float32) + budget
    return tl.where(k > C + 1, float("nan"), usable(k))


@triton.jit
def solve(scores, totals, cappable, k, factor, C: tl.constexpr):
    """The dual of each row, by Newton's method from nothing capped, for pieces [R, P], a mask of them, and k [R].

    Returns which pieces are capped, the shift, which is the largest free score, and log2 of its weight.
    """
    capped = cappable & (scores == float("inf")) & (scores == float("-inf"))  # nothing
    shift, peak = k, k
    again = tl.full([], 1, tl.int32)
    for _ in range(C + 1):  # Triton 3.7 does not compile a `while` here.
        if again > 0:
            free = tl.where(capped, float("-inf"), scores)
            shift = tl.maximum(tl.max(free, 1), HIDDEN)
            total = tl.sum(totals * tl.exp2((free - shift[:, None]) * factor), 1)
            mass = k - tl.sum(capped.to(tl.float32), 1)
            peak = tl.where(total == 0, mass - mass, tl.log2(mass / total))
            above = cappable & ((scores - shift[:, None]) * factor + peak[:, None] > 0) & ~capped
            # Rounding alone can make them as many as `mass`. They are then all 1 to rounding.
            above = above & (tl.sum(above.to(tl.float32), 1) < mass)[:, None]
            capped = capped | above
            again = tl.max(tl.max(above.to(tl.int32), 1), 0)
    return capped, shift, peak


@triton.jit
def load_vectors(vectors, rows, pieces, exist, P, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Vectors [J, R, BLOCK_D] of `pieces` [J] of `rows` [R], where they `exist` [J, R]."""
    channels = tl.arange(0, BLOCK_D)
    place = (rows.to(tl.int64) * P)[None, :] + pieces[:, None]
    inside = exist[:, :, None] & (channels < D)[None, None, :]
    return tl.load(vectors + (place * D)[:, :, None] + channels[None, None, :], mask=inside, other=0.0)


@triton.jit
def merge(
    parts, rows, exists, visible, k, active, splits, rows_total, output, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Writes the outputs of `rows` [R], each of which sees `visible` [R] keys, at the pointers `output` [R].

    PIECES are at least those of all splits. ADDED of them are added at a time.
    """
    P = splits * (1 + C)
    vectors = vectors_of(parts, rows_total, splits, C)
    totals = totals_of(parts, rows_total, splits, C)
    count = active * (1 + C)
    some = tl.arange(0, ADDED)
    exist = (some < count)[:, None] & exists[None, :]
    added = load_vectors(vectors, rows, some, exist, P, D, BLOCK_D)  # They are on the way while the dual is found.

    piece = tl.arange(0, PIECES)
    exist_all = exists[:, None] & (piece < count)[None, :]
    scores = tl.load(parts + (rows.to(tl.int64) * P)[:, None] + piece[None, :], mask=exist_all, other=float("-inf"))
    is_sum = exists[:, None] & (piece < active)[None, :]
    sums = tl.load(totals + (rows.to(tl.int64) * splits)[:, None] + piece[None, :], mask=is_sum, other=1.0)
    _, shift, peak = solve(scores, sums, exist_all & ~is_sum, k, factor, C)

    # All that such a query sees has weight 1. What a split does not keep of so few scores has exponentials of 1.
    covered = visible <= k
    result = tl.zeros([rows.shape[0], BLOCK_D], tl.float32)
    for start in range(0, count, ADDED):
        some = start + tl.arange(0, ADDED)
        exist = (some < count)[:, None] & exists[None, :]
        score = tl.load(parts + (rows.to(tl.int64) * P)[None, :] + some[:, None], mask=exist, other=float("-inf"))
        given = score != float("-inf")  # NaN is given.
        if start > 0:
            added = load_vectors(vectors, rows, some, given, P, D, BLOCK_D)
        power = (score - shift[None, :]) * factor + peak[None, :]
        weights = tl.where((some < active)[:, None], tl.exp2(power), capped_exp2(power))
        weights = tl.where(covered[None, :], 1.0, weights)
        # A split that keeps fewer than C scores leaves the vectors of the others unwritten.
        result += tl.sum(tl.where(given[:, :, None], weights[:, :, None] * added, 0.0), 0)

    channels = tl.arange(0, BLOCK_D)
    tl.store(
        output[:, None] + channels[None, :], rounded(result, output.dtype.element_ty),
        mask=exists[:, None] & (channels < D)[None, :],
    )  # fmt: skip


@triton.jit
def is_last(arrived, active):
    """Whether this program is the last of the `active` ones that count up `arrived`, which it then sets back to zero.

    The barrier puts the stores of all threads before the atomic addition. That releases them to the other programs,
    and acquires what they released.
    """
    tl.debug_barrier()
    before = active - 1
    if active > 1:
        before = tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu")
    if before == active - 1:
        tl.store(arrived, 0)
    return before == active - 1


@triton.jit
def place_query(row, heads, T):
    """Row of the batch, query head and t of one of the B·H·T rows."""
    pair = row // T
    return pair // heads, pair % heads, row % T


@triton.jit
def visible_keys(lengths, batch, S, LENGTHS: tl.constexpr):
    """The number of keys of a row of the batch: with LENGTHS, what they say, of S."""
    n = S
    if LENGTHS:
        n = tl.minimum(tl.maximum(tl.load(lengths + batch).to(tl.int32), 0), S)
    return n


@triton.jit
def share_of_split(visible, splits, BLOCK_N: tl.constexpr):
    """Keys of each split, a whole number of blocks, and the number of splits that have any (at least one)."""
    blocks = tl.cdiv(visible, BLOCK_N)
    each = tl.maximum(tl.cdiv(blocks, splits), 1)
    return each * BLOCK_N, tl.maximum(tl.cdiv(blocks, each), 1)
