"""The exact solver's row kernels, forward and backward: rows in registers, and longer ones in parts.

Shapes: R rows, n entries; [ROWS, BLOCK] tensors, or [BLOCK] where the row comes in parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .row_tiles import (
    ONE,
    SHARP,
    any_of,
    capped_and_free,
    exp2,
    load_entries,
    place_rows,
    saturated,
    store_entries,
    sums,
)
from .tiles import usable

LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # the shift of a row that has nothing free, as in `dual.py`
# About exp(28), the reach of one shift. An entry of weight 1 that lies further below has an exponent with lost digits.
FAINT = tl.constexpr(2.0**40)
REACH = tl.constexpr(30.0)  # log2 of how far below the shift a guess may lie
HIGHEST = tl.constexpr(100.0)  # An entry whose exponent is higher is certainly capped.
HIGH = tl.constexpr(2.0**100)
LEAST_Y = tl.constexpr(2.0**-80)  # For a smaller y, entries that are not capped may be as high.
TINY = tl.constexpr(1e-37)


# With e = exp((s − shift)/ε), for a shift near the solution, the weights are min(1, y·e), and the kernels find y by
# Newton's method on F(y) = Σ min(1, y·e) = k. F is concave, so a step from any y lands left of the solution. From there
# on y only grows, until no further entry is capped.


@triton.jit
def _newton(e, y, count, budget, searching, BLOCK: tl.constexpr):
    """y, the number of capped entries to which it belongs, the y that capped them, and whether no more are capped.

    It starts from a y that is not above the solution and either caps more than `count` or is the y that `count` gives.
    """
    accepted, settled = tl.zeros_like(y), searching & False
    while any_of(searching):
        reached, rest = capped_and_free(e, y, BLOCK)
        settled |= searching & (reached <= count)
        # In exact arithmetic they are always fewer than the budget. Rounding alone can break that, and only if the
        # entries in question are all 1 to rounding. They stay free.
        more = searching & (reached > count) & (reached < budget)
        accepted, count = tl.where(more, y, accepted), tl.where(more, reached, count)
        y = tl.where(more, (budget - reached) / tl.maximum(rest, TINY), y)
        searching = more & (y < FAINT)
    return y, count, accepted, settled


@triton.jit
def _normal_cut(mean, variance, visible, budget):
    """The exponent of the smallest capped score, if the exponents were normal with these mean and variance.

    For n normal scores n·(Q(t) + φ(t)/σ) = k holds at the threshold t, with σ in units of ε, and φ/Q is about t + 1/2,
    or 1/4 for negative t. Exponents are powers of two.
    """
    deviation = tl.sqrt(tl.maximum(variance, 0.0)) + 1e-30
    share = budget / visible
    share /= 1 + tl.maximum(_normal_quantile(share) + 0.5, 0.25) * LOG2E / deviation
    return tl.minimum(mean + deviation * _normal_quantile(share), 0.0)


@triton.jit
def _normal_quantile(share):
    """t with Q(t) = share, to 3e-3: formula 26.2.22 of Abramowitz and Stegun."""
    x = tl.sqrt(-2.0 * tl.log(tl.maximum(tl.minimum(share, 1 - share), 1e-12)))
    t = x - (2.30753 + 0.27061 * x) / (1.0 + x * (0.99229 + 0.04481 * x))
    return tl.where(share > 0.5, -t, t)


@triton.jit
def exact_forward_kernel(
    rows, budgets, weights, saved, R, n, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """A rare branch that needs the scores again reads them again: they are in the cache, and not in registers."""
    row, exists, offset, inside = place_rows(R, n, ROWS, BLOCK)
    s = load_entries(rows, offset, inside, float("-inf"), WHOLE)
    budget = usable(tl.load(budgets + row, mask=exists, other=1.0))
    shift = tl.maximum(tl.max(s, 1), LOWEST)
    exponent = (s - shift[:, None]) * scale
    visible = tl.zeros_like(budget) + n
    total, squares = sums(exponent, exponent * exponent)
    broken = (total != total) | (budget != budget)
    if any_of(total == float("-inf")):
        s = load_entries(rows, offset, inside, float("-inf"), WHOLE)
        visible = tl.sum(tl.where(s > float("-inf"), 1.0, 0.0), 1)
        seen = tl.where(exponent > float("-inf"), exponent, 0.0)
        total, squares = sums(seen, seen * seen)
    unsolved = (visible > budget) & (total == total)
    e = exp2(exponent)
    if tl.max(tl.where(unsolved, budget, 0.0), 0) > 4:
        mean = total / visible
        guess = _normal_cut(mean, squares / visible - mean * mean, visible, budget)
        if any_of(unsolved & (guess < -REACH)):
            # One shift does not reach both the largest score and the threshold.
            shift = tl.where(guess < -REACH, shift + guess / scale, shift)
            guess = tl.where(guess < -REACH, 0.0, guess)
            s = load_entries(rows, offset, inside, float("-inf"), WHOLE)
            e = exp2(tl.minimum((s - shift[:, None]) * scale, HIGHEST))
        y = exp2(-guess)
        reached, rest = capped_and_free(e, y, BLOCK)
        while any_of(unsolved & (reached >= budget) & (y > LEAST_Y)):
            y = tl.where(reached >= budget, y / 64, y)
            reached, rest = capped_and_free(e, y, BLOCK)
        y = (budget - reached) / tl.maximum(rest, TINY)
        searching = unsolved & (reached < budget) & (y < FAINT) & (y > LEAST_Y)
        first = tl.full([ROWS], -1.0, tl.float32)
    else:
        y = budget / tl.sum(e, 1)
        searching, first = unsolved, tl.zeros_like(y)
    y, count, accepted, settled = _newton(e, y, first, budget, searching, BLOCK)
    # Other rows start once more, from the largest score that is not certainly capped. That gives all digits, and the
    # scores below it may have underflowed.
    count = tl.maximum(count, 0.0)
    unsettled = unsolved & ~settled & (count > first)
    while any_of(unsettled):
        first = tl.where(unsettled, count, first)
        s = load_entries(rows, offset, inside, float("-inf"), WHOLE)
        top = tl.max(tl.where(e * accepted[:, None] <= ONE, s, float("-inf")), 1)
        shift = tl.where(unsettled, top, shift)
        below = s <= shift[:, None]
        again = tl.where(below, exp2((s - shift[:, None]) * scale), HIGH)
        e = tl.where(unsettled[:, None], again, e)
        y = tl.where(unsettled, (budget - first) / tl.sum(tl.where(below, e, 0.0), 1), y)
        y, count, accepted, now_settled = _newton(e, y, first, budget, unsettled, BLOCK)
        settled |= now_settled
        unsettled &= ~now_settled & (count > first)
    y = tl.where(settled, y, tl.minimum(y, 1.0))
    values = saturated(e, y[:, None], 0.0)
    if any_of(~unsolved):
        full = ~unsolved & ~broken
        s = load_entries(rows, offset, inside, float("-inf"), WHOLE)
        values = tl.where(full[:, None], tl.where(s > float("-inf"), 1.0, 0.0), values)
        values = tl.where(broken[:, None], float("nan"), values)
        shift = tl.where(full, LOWEST, shift)
        y = tl.where(full, 1.0, tl.where(broken, float("nan"), y))
    store_entries(weights, offset, values, inside, WHOLE)
    tl.store(saved + row, shift, mask=exists)
    tl.store(saved + R + row, y, mask=exists)


@triton.jit
def _place_in_part(start, n, BLOCK: tl.constexpr):
    """Offsets [4, BLOCK / 4] of a part of a row, and which of them exist. Sums over the first axis stay in a thread."""
    column = start + tl.arange(0, 4)[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    return column, column < n


@triton.jit
def _capped_parts(rows, n, shift, scale, y, spread, BLOCK: tl.constexpr):
    """`capped_and_free` for y, y(1 + spread), y(1 + 4·spread) and y(1 + 16·spread), by one reading of the row."""
    y1, y2, y3 = y * (1 + spread), y * (1 + 4 * spread), y * (1 + 16 * spread)
    free0, free1, free2, free3 = (tl.zeros([BLOCK // 4], tl.float32),) * 4
    rest0, rest1, rest2, rest3 = (tl.zeros([BLOCK // 4], tl.float32),) * 4
    for start in range(0, n, BLOCK):
        column, inside = _place_in_part(start, n, BLOCK)
        s = load_entries(rows, column, inside, float("-inf"))
        e = exp2(tl.minimum((s - shift) * scale, HIGHEST))
        free = saturated(e, -y * (SHARP / ONE), SHARP)
        free0, rest0 = free0 + tl.sum(free, 0), rest0 + tl.sum(free * e, 0)
        free = saturated(e, -y1 * (SHARP / ONE), SHARP)
        free1, rest1 = free1 + tl.sum(free, 0), rest1 + tl.sum(free * e, 0)
        free = saturated(e, -y2 * (SHARP / ONE), SHARP)
        free2, rest2 = free2 + tl.sum(free, 0), rest2 + tl.sum(free * e, 0)
        free = saturated(e, -y3 * (SHARP / ONE), SHARP)
        free3, rest3 = free3 + tl.sum(free, 0), rest3 + tl.sum(free * e, 0)
    read = tl.cdiv(n, BLOCK) * BLOCK
    return (
        (y, read - tl.sum(free0), tl.sum(rest0)),
        (y1, read - tl.sum(free1), tl.sum(rest1)),
        (y2, read - tl.sum(free2), tl.sum(rest2)),
        (y3, read - tl.sum(free3), tl.sum(rest3)),
    )


@triton.jit
def exact_forward_parts_kernel(rows, budgets, weights, saved, R, n, scale, BLOCK: tl.constexpr):
    """The row is read once for its mean and deviation, once for each step of Newton, and once to be written."""
    row = tl.program_id(0).to(tl.int64)
    rows += row * n
    weights += row * n
    budget = usable(tl.load(budgets + row))
    pivot = tl.load(rows).to(tl.float32)
    pivot = tl.where(tl.abs(pivot) < 1e30, pivot, 0.0)
    tops = tl.full([BLOCK // 4], LOWEST, tl.float32)
    visibles, totals, squares = (tl.zeros([BLOCK // 4], tl.float32),) * 3
    for start in range(0, n, BLOCK):
        column, inside = _place_in_part(start, n, BLOCK)
        s = load_entries(rows, column, inside, float("-inf"))
        tops = tl.maximum(tops, tl.max(s, 0))
        visibles += tl.sum(tl.where(s > float("-inf"), 1.0, 0.0), 0)
        exponent = tl.where(s == float("-inf"), 0.0, (s - pivot) * scale)
        totals += tl.sum(exponent, 0)
        squares += tl.sum(exponent * exponent, 0)
    top, visible = tl.max(tops), tl.sum(visibles)
    mean = tl.sum(totals) / tl.maximum(visible, 1.0)
    mean = tl.where(budget == budget, mean, budget)
    guess = _normal_cut(
        mean - (top - pivot) * scale, tl.sum(squares) / tl.maximum(visible, 1.0) - mean * mean, visible, budget
    )
    unsolved = (visible > budget) & (mean == mean)
    shift = tl.where(visible > budget, top + guess / scale, LOWEST)
    y, count, settled = tl.where(unsolved, 0.8, tl.where(mean == mean, 1.0, mean)), -1.0, False
    # Each reading tries four values of y, far apart around the guess and close together after it. The best of their
    # steps is the next y. If two of the values bracket it and cap the same entries, it is the last.
    spread = 0.06
    searching = unsolved
    while searching:
        first, second, third, fourth = _capped_parts(rows, n, shift, scale, y, spread, BLOCK)
        if first[1] >= budget:
            searching = (count < 0) & (y > LEAST_Y)
            y = tl.where(searching, y / 64, y)
        elif first[1] <= count:
            settled, searching = True, False
        else:
            best = _better(first, _better(second, _better(third, fourth, budget), budget), budget)
            y = (budget - best[1]) / tl.maximum(best[2], TINY)
            settled = _brackets(first, best, y) | _brackets(second, best, y)
            settled |= _brackets(third, best, y) | _brackets(fourth, best, y)
            count = tl.where(best[0] <= y, best[1], -1.0)
            reliable = (y < FAINT) & (y > LEAST_Y)
            settled &= reliable
            searching = ~settled & reliable
            spread = 0.004
    if unsolved & ~settled:
        shift, y = _search_parts(rows, n, top, scale, budget, BLOCK)
    for start in range(0, n, BLOCK):
        column, inside = _place_in_part(start, n, BLOCK)
        s = load_entries(rows, column, inside, float("-inf"))
        values = tl.minimum(exp2((s - shift) * scale) * y, 1.0, propagate_nan=tl.PropagateNan.ALL)
        store_entries(weights, column, values, inside)
    tl.store(saved + row, shift)
    tl.store(saved + R + row, y)


@triton.jit
def _better(one, other, budget):
    """The one of two (y, capped, rest) with the larger step of Newton. Steps never pass the solution."""
    valid = (other[1] < budget) & ((one[1] >= budget) | ((budget - other[1]) * one[2] > (budget - one[1]) * other[2]))
    return tl.where(valid, other[0], one[0]), tl.where(valid, other[1], one[1]), tl.where(valid, other[2], one[2])


@triton.jit
def _brackets(one, best, y):
    """Whether y stands between two values that cap the same entries."""
    return (one[1] == best[1]) & (tl.minimum(one[0], best[0]) <= y) & (y <= tl.maximum(one[0], best[0]))


@triton.jit
def _search_parts(rows, n, top, scale, budget, BLOCK: tl.constexpr):
    """The dual of any row. The steps start with nothing capped, and each is relative to the largest free score."""
    shift, peak = top, 1.0
    # An entry is capped above `cut`, the score of weight 1, and also from `edge` on, the largest score that was free.
    cut, edge = float("inf"), float("inf")
    searching = True
    while searching:
        lowest = tl.full([], LOWEST, tl.float32)
        highest, total, count = lowest, 0.0, 0.0
        for start in range(0, n, BLOCK):
            column, inside = _place_in_part(start, n, BLOCK)
            s = load_entries(rows, column, inside, float("-inf"))
            capped = (s > cut) | (s >= edge)
            count += tl.sum(tl.where(capped, 1.0, 0.0))
            s = tl.where(capped, float("-inf"), s)
            higher = tl.maximum(highest, tl.max(s))
            total = total * tl.exp2((highest - higher) * scale) + tl.sum(exp2((s - higher) * scale))
            highest = higher
        # As in `_newton`: if rounding alone would cap as many entries as the budget, they stay free.
        allowed = count < budget
        shift = tl.where(allowed, highest, shift)
        peak = tl.where(allowed, (budget - count) / total, peak)
        cut, edge = shift - tl.log2(peak) / scale, shift
        searching = allowed & (peak > 1)
    return shift, tl.minimum(peak, 1.0)


@triton.jit
def _free_weights(s, shift, peak, scale):
    """The weights of the entries that are not capped, and 0 for the others. NaN stays NaN."""
    weights = exp2((s - shift) * scale) * peak
    return tl.where(weights > ONE, 0.0, weights)


@triton.jit
def exact_backward_kernel(
    grad_weights, rows, saved, grad_scores, grad_budget, R, n, scale, inverse_eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, exists, offset, inside = place_rows(R, n, ROWS, BLOCK)
    s = load_entries(rows, offset, inside, float("-inf"), WHOLE)
    g = load_entries(grad_weights, offset, inside, 0.0, WHOLE)
    shift = tl.load(saved + row, mask=exists, other=LOWEST)
    peak = tl.load(saved + R + row, mask=exists, other=1.0)
    free = _free_weights(s, shift[:, None], peak[:, None], scale)
    mass, weighted = sums(free, free * g)
    delta = tl.where(mass == 0, 0.0, weighted / tl.where(mass == 0, 1.0, mass))
    store_entries(grad_scores, offset, free * inverse_eps * (g - delta[:, None]), inside, WHOLE)
    tl.store(grad_budget + row, delta, mask=exists)


@triton.jit
def exact_backward_parts_kernel(
    grad_weights, rows, saved, grad_scores, grad_budget, R, n, scale, inverse_eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    shift, peak = tl.load(saved + row), tl.load(saved + R + row)
    mass, weighted = 0.0, 0.0
    for start in range(0, n, BLOCK):
        s = load_entries(rows + row * n + start, column, column < n - start, float("-inf"))
        g = load_entries(grad_weights + row * n + start, column, column < n - start, 0.0)
        free = _free_weights(s, shift, peak, scale)
        mass += tl.sum(free, 0)
        weighted += tl.sum(free * g, 0)
    delta = tl.where(mass == 0, 0.0, weighted / tl.where(mass == 0, 1.0, mass))
    for start in range(0, n, BLOCK):
        s = load_entries(rows + row * n + start, column, column < n - start, float("-inf"))
        g = load_entries(grad_weights + row * n + start, column, column < n - start, 0.0)
        free = _free_weights(s, shift, peak, scale)
        store_entries(grad_scores + row * n + start, column, free * inverse_eps * (g - delta), column < n - start)
    tl.store(grad_budget + row, delta)
