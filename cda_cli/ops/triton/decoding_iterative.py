"""Decoding with the iterative solver: a program takes one query and all of its keys.

It writes the scores to memory, iterates on all of them in registers, and reads them again with the values.

An iteration needs one sum over the row, of min(e, cut) for the exponentials e of the scores. It is count·cut + rest,
for the `count` capped entries, e > cut, and the `rest`, the sum of the others. The next cut is that sum / k. So while ε
stays the same and no entry becomes capped or free, an iteration is one multiply-add with numbers that are known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decoding_pieces import place_query, visible_keys
from .row_tiles import exp2, log2
from .rows_iterative import FAINT, FAR, HIGHEST, finite_or_0, held_budget, weights_of
from .tiles import INTERPRETED, SIZES, load_tile, rounded, usable


@triton.jit
def _combined(count, rest, lowest, highest, other_count, other_rest, other_lowest, other_highest):
    return (
        count + other_count, rest + other_rest, tl.minimum(lowest, other_lowest), tl.maximum(highest, other_highest)
    )  # fmt: skip


@triton.jit
def _parts(e, cut):
    """How many of e [n] are capped, the sum of the others, the lowest capped one and the highest other one."""
    capped = e > cut
    ones, free = tl.where(capped, 1.0, 0.0), tl.where(capped, 0.0, e)
    lowest = tl.where(capped, e, float("inf"))
    if INTERPRETED:  # The interpreter reduces tuples entry by entry.
        return tl.sum(ones, 0), tl.sum(free, 0), tl.min(lowest, 0), tl.max(free, 0)
    return tl.reduce((ones, free, lowest, free), 0, _combined)


@triton.jit
def _next_a(log_k, level, total, unit):
    """ε(log k − logsumexp), from exponentials relative to `level`, for unit = ε·log 2."""
    return unit * (log_k - log2(total)) - level


@triton.jit
def _last_a(d, top, visible, k, units, n_iters, steady):
    """a + top after all iterations, for d = s − top [n], FAR where hidden, of which `visible` are not.

    units [2, n_iters] are ε·log 2 of each iteration, and the inverse. From iteration `steady` on, ε stays the same.
    """
    budget = held_budget(k)
    log_k, share = tl.log2(budget), 1.0 / budget
    a = _next_a(log_k, -top, visible.to(tl.float32), tl.load(units))  # b starts as −s, so every exponent is 0.
    inverses = units + n_iters
    t = tl.minimum(1, n_iters - 1)
    unit, scale = tl.load(units + t), tl.load(inverses + t)
    for step in range(1, steady):
        # They are on the way during this iteration.
        next_unit, next_scale = tl.load(units + step + 1), tl.load(inverses + step + 1)
        level = tl.minimum(-a, 0.0)
        total = tl.sum(exp2((tl.minimum(d, -a) - level) * scale), 0)
        a = _next_a(log_k, level, total, unit)
        unit, scale = next_unit, next_scale
    t = tl.maximum(steady, 1)
    while t < n_iters:
        level = tl.minimum(-a, 0.0)
        e = exp2(tl.minimum((d - level) * scale, HIGHEST))
        cut = tl.exp2(tl.minimum((-a - level) * scale, HIGHEST))
        count, rest, lowest, highest = _parts(e, cut)
        # Beyond FAINT the exponentials are computed anew, from another level, as their digits do not reach further.
        lowest, highest = tl.minimum(lowest, FAINT), tl.maximum(highest, 1 / FAINT)
        total = count * cut + rest
        cut, t = total * share, t + 1
        while (t < n_iters) & (cut >= highest) & (cut < lowest):
            total = count * cut + rest
            cut, t = total * share, t + 1
        a = _next_a(log_k, level, total, unit)
    return a


@triton.jit(do_not_specialize=(*SIZES, "n_iters", "steady"))
def decode_iterative_kernel(
    query, key, value, lengths, budgets, units, output, scores,
    budget, scale, n_iters, steady, last_eps,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    stride_ob, stride_oh, stride_ot,
    key_heads, group, T, S,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, LENGTHS: tl.constexpr,
    BUDGETS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes output [B, H, T, D]. The grid has a program for each of the B·H·T rows; `scores` [rows, S] is memory.

    With LENGTHS, lengths [B] says how many keys a row of the batch has, of S. The k of each query is in budgets
    [B, H, T], or is `budget`. The iterations have `units` (see `_last_a`), and the weights last_eps.
    """
    row = tl.program_id(0)
    batch, head, t = place_query(row, key_heads * group, T)
    visible = tl.minimum(tl.maximum(visible_keys(lengths, batch, S, LENGTHS) - T + t + 1, 0), S)
    channels, slots = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    query += batch.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + t.to(tl.int64) * stride_qt
    q = tl.load(query + channels, mask=channels < D, other=0.0).to(tl.float32)
    key += batch.to(tl.int64) * stride_kb + (head // group).to(tl.int64) * stride_kh
    value += batch.to(tl.int64) * stride_vb + (head // group).to(tl.int64) * stride_vh
    scores += row.to(tl.int64) * S
    k = usable(tl.load(budgets + row) if BUDGETS else budget)

    for start in tl.range(0, visible, BLOCK_N, num_stages=STAGES):
        keys = load_tile(key, slots, stride_ks, visible - start, D, BLOCK_D, True)
        products = tl.sum(q[None, :] * keys.to(tl.float32), 1)
        tl.store(scores + start + slots, products * scale, mask=start + slots < visible)
        key += BLOCK_N * stride_ks
    tl.debug_barrier()  # Below, every thread reads what others have stored above.

    entries = tl.arange(0, BLOCK_S)
    s = tl.load(scores + entries, mask=entries < visible, other=FAR)
    top = finite_or_0(tl.max(s, 0))
    a = _last_a(s - top, top, visible, k, units, n_iters, steady)

    sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in tl.range(0, visible, BLOCK_N, num_stages=STAGES):
        some = tl.load(scores + start + slots, mask=start + slots < visible, other=FAR)
        values = load_tile(value, slots, stride_vs, visible - start, D, BLOCK_D, True)
        sums += weights_of(some - top, a, last_eps)[:, None] * values.to(tl.float32)
        value += BLOCK_N * stride_vs
    place = batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + t.to(tl.int64) * stride_ot
    result = rounded(tl.sum(sums, 0), output.dtype.element_ty)
    tl.store(output + place + channels, result, mask=channels < D)
