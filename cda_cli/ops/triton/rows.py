"""The row operator in Triton: both solvers, one read of the row and one write.

A row of up to `REGISTER_LIMIT` scores is held in registers, by one program (several short rows share one); a longer
one is read again, in parts, for every step of its solver. Scores are float32, bf16 or fp16, −inf where masked; the
arithmetic is float32. What is saved is as on the PyTorch path, but that the exact dual's shift may be any score near
the solution, and its peak above 1.

Shapes: R rows, n entries. In the kernels [ROWS, BLOCK] tensors, or [BLOCK] where the row comes in parts.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cda_cli.ops.triton.tiles import INTERPRETED, rounded

REGISTER_LIMIT = 16384  # of n
PART = 4096  # entries of a longer row that are read at a time; of half precision twice as many

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # the shift of a row with nothing free, as in cda_cli.ops.dual
LOG2E = tl.constexpr(math.log2(math.e))
# exp(28), the reach of one shift: the exponent of an entry with weight 1 that is further below has lost digits.
FAINT = tl.constexpr(2.0**40)
REACH = tl.constexpr(30.0)  # log2, of a guess
# A weight up to here is 1 to rounding, and its entry stays free: with an integer k and a small ε the k-th entry is.
ONE = tl.constexpr(1 + 2.0**-20)
SHARP = tl.constexpr(2.0**60)
HIGHEST = tl.constexpr(100.0)  # of an exponent whose entry is capped for certain
HIGH = tl.constexpr(2.0**100)
LEAST_Y = tl.constexpr(2.0**-80)  # below it, entries that are not capped may be as high
TINY = tl.constexpr(1e-37)
LEAST_BUDGET = tl.constexpr(1e-20)
FAR = tl.constexpr(-1e20)


def exact_forward(rows: Tensor, budget: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Weights [R, n] in the dtype of `rows` [R, n], and the dual [2, R] float32 (shift, peak) of `Dual`.

    budget [R] float32.
    """
    R, n = rows.shape
    rows, budget = rows.contiguous(), budget.contiguous()
    weights, saved = torch.empty_like(rows), torch.empty((2, R), dtype=torch.float32, device=rows.device)
    scale = math.log2(math.e) / eps
    with torch.cuda.device_of(rows):
        if n > REGISTER_LIMIT:
            _exact_forward_parts[(R,)](rows, budget, weights, saved, R, n, scale, BLOCK=_part(rows), num_warps=8)
        elif R:
            grid, options = _tile(R, n, entries_per_thread=64)
            _exact_forward[grid](rows, budget, weights, saved, R, n, scale, **options)
    return weights, saved


def exact_backward(grad_weights: Tensor, rows: Tensor, saved: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(∂L/∂s [R, n] in the dtype of `rows`, ∂L/∂k [R] float32) for grad_weights [R, n] and the saved dual [2, R]."""
    R, n = rows.shape
    rows, grad_weights, saved = rows.contiguous(), grad_weights.contiguous(), saved.contiguous()
    grad_scores, grad_budget = torch.empty_like(rows), torch.empty_like(saved[0])
    scale = math.log2(math.e) / eps
    tensors = (grad_weights, rows, saved, grad_scores, grad_budget)
    with torch.cuda.device_of(rows):
        if n > REGISTER_LIMIT:
            _exact_backward_parts[(R,)](*tensors, R, n, scale, 1 / eps, BLOCK=_part(rows), num_warps=8)
        elif R:
            grid, options = _tile(R, n, entries_per_thread=32)
            _exact_backward[grid](*tensors, R, n, scale, 1 / eps, **options)
    return grad_scores, grad_budget


def iterative_forward(
    rows: Tensor, budget: Tensor, eps_steps: tuple[float, ...], last_eps: float
) -> tuple[Tensor, Tensor]:
    """Weights [R, n] in the dtype of `rows` [R, n], and the history of a [n_iters, R] float32; budget [R] float32."""
    R, n = rows.shape
    rows, budget = rows.contiguous(), budget.contiguous()
    weights = torch.empty_like(rows)
    history = torch.empty((len(eps_steps), R), dtype=torch.float32, device=rows.device)
    tensors = (rows, budget, _on_device(eps_steps, rows.device), weights, history)
    with torch.cuda.device_of(rows):
        if n > REGISTER_LIMIT:
            _iterative_forward_parts[(R,)](*tensors, R, n, len(eps_steps), last_eps, BLOCK=_part(rows), num_warps=8)
        elif R:
            grid, options = _tile(R, n, entries_per_thread=16)
            _iterative_forward[grid](*tensors, R, n, len(eps_steps), last_eps, **options)
    return weights, history


def iterative_backward(
    grad_weights: Tensor, rows: Tensor, budget: Tensor, history: Tensor, eps_steps: tuple[float, ...], last_eps: float
) -> tuple[Tensor, Tensor]:
    """(∂L/∂s [R, n] in the dtype of `rows`, ∂L/∂k [R] float32): the unrolled iteration run backwards.

    grad_weights [R, n]; budget [R] and history [n_iters, R] float32.
    """
    R, n = rows.shape
    rows, grad_weights = rows.contiguous(), grad_weights.contiguous()
    budget, history = budget.contiguous(), history.contiguous()
    grad_scores, grad_budget = torch.empty_like(rows), torch.empty_like(budget)
    tensors = (grad_weights, rows, budget, history, _on_device(eps_steps, rows.device), grad_scores, grad_budget)
    with torch.cuda.device_of(rows):
        if n > REGISTER_LIMIT // 2:  # it holds twice as much of a row as the others
            factors = torch.empty_like(history)
            _iterative_backward_parts[(R,)](
                *tensors, factors, R, n, len(eps_steps), last_eps, BLOCK=_part(rows), num_warps=8
            )
        elif R:
            grid, options = _tile(R, n, entries_per_thread=16)
            _iterative_backward[grid](*tensors, R, n, len(eps_steps), last_eps, **options)
    return grad_scores, grad_budget


def _tile(R: int, n: int, entries_per_thread: int) -> tuple[tuple[int], dict[str, int | bool]]:
    """The grid, and of a program: rows, entries of a row, whether all of these exist, warps.

    A program has 512 entries at least, or 32 rows. Chosen so that the kernel spills no registers on sm_90.
    """
    block: int = triton.next_power_of_2(n)
    rows = min(32, max(1, 512 // block))
    whole = n == block and R % rows == 0
    warps = min(16, max(1, rows * block // (32 * (entries_per_thread if whole else min(entries_per_thread, 32)))))
    return (triton.cdiv(R, rows),), {"ROWS": rows, "BLOCK": block, "WHOLE": whole, "num_warps": warps}


def _part(rows: Tensor) -> int:
    return PART * 4 // rows.element_size()


@functools.lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept, so that a forward does not wait for the copy of a few numbers."""
    return torch.tensor(values, dtype=torch.float32, device=device)


@triton.jit
def _place(R, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of this program: its rows [ROWS], which of them exist, the offsets of their entries and which of these exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    return row, row < R, row[:, None] * n + column[None, :], (row < R)[:, None] & (column < n)[None, :]


@triton.jit
def _load(pointer, offset, inside, absent, WHOLE: tl.constexpr = False):
    """float32; WHOLE: everything is inside."""
    if WHOLE:
        return tl.load(pointer + offset).to(tl.float32)
    return tl.load(pointer + offset, mask=inside, other=absent).to(tl.float32)


@triton.jit
def _store(pointer, offset, values, inside, WHOLE: tl.constexpr = False):
    values = rounded(values, pointer.dtype.element_ty)
    if WHOLE:
        tl.store(pointer + offset, values)
    else:
        tl.store(pointer + offset, values, mask=inside)


@triton.jit
def _exp2(x):
    """2^x, and 0 where that is below 2^−126: the numbers below it would cost three instructions more."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def _saturated(a, b, c):
    """a·b + c, held between 0 and 1, in one instruction of the pipe that is least busy; 0 for NaN."""
    if INTERPRETED:
        value = a * b + c
        return tl.where(value == value, tl.minimum(tl.maximum(value, 0.0), 1.0), 0.0)
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sums(a, b):
    """The sums of both over a row, by one reduction."""
    if INTERPRETED:  # it reduces pairs entry by entry
        return tl.sum(a, 1), tl.sum(b, 1)
    return tl.reduce((a, b), 1, _add_pairs)


@triton.jit
def _any(condition):
    return tl.max(condition.to(tl.int32), 0) > 0


# The exact solver. e = exp((s − shift)/ε) for a shift near the solution, weights min(1, y·e): Newton's method on
# F(y) = Σ min(1, y·e) = k. F is concave, so a step from any y lands left of the solution, and from there on the steps
# only grow, until no further entry is capped.


@triton.jit
def _capped(e, y, BLOCK: tl.constexpr):
    """How many entries have y·e above 1 (to rounding), and the sum of the e of the others.

    The comparison is a multiply-add that is 1 or 0: SHARP·(1 − y·e), whose product is not rounded.
    """
    free = _saturated(e, -(y * (SHARP / ONE))[:, None], SHARP)
    count, rest = _sums(free, free * e)
    return BLOCK - count, rest


@triton.jit
def _newton(e, y, count, budget, searching, BLOCK: tl.constexpr):
    """y, the number of capped entries that it belongs to, the y that capped these, and whether no more are.

    Starts from a y that is not above the solution and that caps more than `count`, or is the one that `count` gives.
    """
    accepted, settled = tl.zeros_like(y), searching & False
    while _any(searching):
        reached, rest = _capped(e, y, BLOCK)
        settled |= searching & (reached <= count)
        # Always fewer than the budget in exact arithmetic. Rounding alone can break that, and only where the entries
        # in question are all 1 to rounding: they stay free.
        more = searching & (reached > count) & (reached < budget)
        accepted, count = tl.where(more, y, accepted), tl.where(more, reached, count)
        y = tl.where(more, (budget - reached) / tl.maximum(rest, TINY), y)
        searching = more & (y < FAINT)
    return y, count, accepted, settled


@triton.jit
def _normal_cut(mean, variance, visible, budget):
    """The exponent of the smallest capped score, if the exponents were normal with these mean and variance.

    Of n normal scores n·(Q(t) + φ(t)/σ) = k at the threshold t, σ in units of ε, and φ/Q is about t + 1/2, or 1/4 for
    negative t. Exponents are powers of two.
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
def _exact_forward(
    rows, budgets, weights, saved, R, n, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr
):
    """Where a rare branch needs the scores again, it reads them again: they are in the cache, and not in registers."""
    row, exists, offset, inside = _place(R, n, ROWS, BLOCK)
    s = _load(rows, offset, inside, float("-inf"), WHOLE)
    budget = tl.load(budgets + row, mask=exists, other=1.0)
    shift = tl.maximum(tl.max(s, 1), LOWEST)
    exponent = (s - shift[:, None]) * scale
    visible = tl.zeros_like(budget) + n
    total, squares = _sums(exponent, exponent * exponent)
    broken = total != total
    if _any(total == float("-inf")):
        s = _load(rows, offset, inside, float("-inf"), WHOLE)
        visible = tl.sum(tl.where(s > float("-inf"), 1.0, 0.0), 1)
        seen = tl.where(exponent > float("-inf"), exponent, 0.0)
        total, squares = _sums(seen, seen * seen)
    unsolved = (visible > budget) & (total == total)
    e = _exp2(exponent)
    if tl.max(tl.where(unsolved, budget, 0.0), 0) > 4:
        mean = total / visible
        guess = _normal_cut(mean, squares / visible - mean * mean, visible, budget)
        if _any(unsolved & (guess < -REACH)):
            # The exponentials of the largest score and of the threshold do not go together.
            shift = tl.where(guess < -REACH, shift + guess / scale, shift)
            guess = tl.where(guess < -REACH, 0.0, guess)
            s = _load(rows, offset, inside, float("-inf"), WHOLE)
            e = _exp2(tl.minimum((s - shift[:, None]) * scale, HIGHEST))
        y = _exp2(-guess)
        reached, rest = _capped(e, y, BLOCK)
        while _any(unsolved & (reached >= budget) & (y > LEAST_Y)):
            y = tl.where(reached >= budget, y / 64, y)
            reached, rest = _capped(e, y, BLOCK)
        y = (budget - reached) / tl.maximum(rest, TINY)
        searching = unsolved & (reached < budget) & (y < FAINT) & (y > LEAST_Y)
        first = tl.full([ROWS], -1.0, tl.float32)
    else:
        y = budget / tl.sum(e, 1)
        searching, first = unsolved, tl.zeros_like(y)
    y, count, accepted, settled = _newton(e, y, first, budget, searching, BLOCK)
    # Elsewhere once more, from the largest score that is not capped for certain: for all digits, and because what
    # follows it may have underflowed.
    count = tl.maximum(count, 0.0)
    unsettled = unsolved & ~settled & (count > first)
    while _any(unsettled):
        first = tl.where(unsettled, count, first)
        s = _load(rows, offset, inside, float("-inf"), WHOLE)
        top = tl.max(tl.where(e * accepted[:, None] <= ONE, s, float("-inf")), 1)
        shift = tl.where(unsettled, top, shift)
        below = s <= shift[:, None]
        again = tl.where(below, _exp2((s - shift[:, None]) * scale), HIGH)
        e = tl.where(unsettled[:, None], again, e)
        y = tl.where(unsettled, (budget - first) / tl.sum(tl.where(below, e, 0.0), 1), y)
        y, count, accepted, now_settled = _newton(e, y, first, budget, unsettled, BLOCK)
        settled |= now_settled
        unsettled &= ~now_settled & (count > first)
    y = tl.where(settled, y, tl.minimum(y, 1.0))
    values = _saturated(e, y[:, None], 0.0)
    if _any(~unsolved):
        full = ~unsolved & ~broken
        s = _load(rows, offset, inside, float("-inf"), WHOLE)
        values = tl.where(full[:, None], tl.where(s > float("-inf"), 1.0, 0.0), values)
        values = tl.where(broken[:, None], float("nan"), values)
        shift = tl.where(full, LOWEST, shift)
        y = tl.where(full, 1.0, tl.where(broken, float("nan"), y))
    _store(weights, offset, values, inside, WHOLE)
    tl.store(saved + row, shift, mask=exists)
    tl.store(saved + R + row, y, mask=exists)


@triton.jit
def _place_in_part(start, n, BLOCK: tl.constexpr):
    """Offsets [4, BLOCK / 4] of a part of a row, and which exist. Sums over the first axis stay within a thread."""
    column = start + tl.arange(0, 4)[:, None] * (BLOCK // 4) + tl.arange(0, BLOCK // 4)[None, :]
    return column, column < n


@triton.jit
def _capped_parts(rows, n, shift, scale, y, spread, BLOCK: tl.constexpr):
    """`_capped` for y, y(1 + spread), y(1 + 4·spread) and y(1 + 16·spread), by one reading of the row."""
    y1, y2, y3 = y * (1 + spread), y * (1 + 4 * spread), y * (1 + 16 * spread)
    free0, free1, free2, free3 = (tl.zeros([BLOCK // 4], tl.float32),) * 4
    rest0, rest1, rest2, rest3 = (tl.zeros([BLOCK // 4], tl.float32),) * 4
    for start in range(0, n, BLOCK):
        column, inside = _place_in_part(start, n, BLOCK)
        s = _load(rows, column, inside, float("-inf"))
        e = _exp2(tl.minimum((s - shift) * scale, HIGHEST))
        free = _saturated(e, -y * (SHARP / ONE), SHARP)
        free0, rest0 = free0 + tl.sum(free, 0), rest0 + tl.sum(free * e, 0)
        free = _saturated(e, -y1 * (SHARP / ONE), SHARP)
        free1, rest1 = free1 + tl.sum(free, 0), rest1 + tl.sum(free * e, 0)
        free = _saturated(e, -y2 * (SHARP / ONE), SHARP)
        free2, rest2 = free2 + tl.sum(free, 0), rest2 + tl.sum(free * e, 0)
        free = _saturated(e, -y3 * (SHARP / ONE), SHARP)
        free3, rest3 = free3 + tl.sum(free, 0), rest3 + tl.sum(free * e, 0)
    read = tl.cdiv(n, BLOCK) * BLOCK
    return (
        (y, read - tl.sum(free0), tl.sum(rest0)),
        (y1, read - tl.sum(free1), tl.sum(rest1)),
        (y2, read - tl.sum(free2), tl.sum(rest2)),
        (y3, read - tl.sum(free3), tl.sum(rest3)),
    )


@triton.jit
def _exact_forward_parts(rows, budgets, weights, saved, R, n, scale, BLOCK: tl.constexpr):
    """The row is read once for its mean and deviation, once for each step of Newton, and once to be written."""
    row = tl.program_id(0).to(tl.int64)
    rows += row * n
    weights += row * n
    budget = tl.load(budgets + row)
    pivot = tl.load(rows).to(tl.float32)
    pivot = tl.where(tl.abs(pivot) < 1e30, pivot, 0.0)
    tops = tl.full([BLOCK // 4], LOWEST, tl.float32)
    visibles, totals, squares = (tl.zeros([BLOCK // 4], tl.float32),) * 3
    for start in range(0, n, BLOCK):
        column, inside = _place_in_part(start, n, BLOCK)
        s = _load(rows, column, inside, float("-inf"))
        tops = tl.maximum(tops, tl.max(s, 0))
        visibles += tl.sum(tl.where(s > float("-inf"), 1.0, 0.0), 0)
        exponent = tl.where(s == float("-inf"), 0.0, (s - pivot) * scale)
        totals += tl.sum(exponent, 0)
        squares += tl.sum(exponent * exponent, 0)
    top, visible = tl.max(tops), tl.sum(visibles)
    mean = tl.sum(totals) / tl.maximum(visible, 1.0)
    guess = _normal_cut(
        mean - (top - pivot) * scale, tl.sum(squares) / tl.maximum(visible, 1.0) - mean * mean, visible, budget
    )
    unsolved = (visible > budget) & (mean == mean)
    shift = tl.where(visible > budget, top + guess / scale, LOWEST)
    y, count, settled = tl.where(unsolved, 0.8, tl.where(mean == mean, 1.0, mean)), -1.0, False
    # Four values of y at each reading, far apart around the guess and close together after it: the best of their steps
    # is next, and if two of them bracket it and cap the same entries, it is the last.
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
        s = _load(rows, column, inside, float("-inf"))
        values = tl.minimum(_exp2((s - shift) * scale) * y, 1.0, propagate_nan=tl.PropagateNan.ALL)
        _store(weights, column, values, inside)
    tl.store(saved + row, shift)
    tl.store(saved + R + row, y)


@triton.jit
def _better(one, other, budget):
    """Of two (y, capped, rest) the one with the larger step of Newton; steps never pass the solution."""
    valid = (other[1] < budget) & ((one[1] >= budget) | ((budget - other[1]) * one[2] > (budget - one[1]) * other[2]))
    return tl.where(valid, other[0], one[0]), tl.where(valid, other[1], one[1]), tl.where(valid, other[2], one[2])


@triton.jit
def _brackets(one, best, y):
    """Whether y stands between two values that cap the same entries."""
    return (one[1] == best[1]) & (tl.minimum(one[0], best[0]) <= y) & (y <= tl.maximum(one[0], best[0]))


@triton.jit
def _search_parts(rows, n, top, scale, budget, BLOCK: tl.constexpr):
    """The dual by steps from nothing capped, each relative to the largest score that is free: for any row."""
    shift, peak = top, 1.0
    # An entry is capped above `cut`, the score of weight 1, and from `edge` on, the largest score that was free.
    cut, edge = float("inf"), float("inf")
    searching = True
    while searching:
        lowest = tl.full([], LOWEST, tl.float32)
        highest, total, count = lowest, 0.0, 0.0
        for start in range(0, n, BLOCK):
            column, inside = _place_in_part(start, n, BLOCK)
            s = _load(rows, column, inside, float("-inf"))
            capped = (s > cut) | (s >= edge)
            count += tl.sum(tl.where(capped, 1.0, 0.0))
            s = tl.where(capped, float("-inf"), s)
            higher = tl.maximum(highest, tl.max(s))
            total = total * tl.exp2((highest - higher) * scale) + tl.sum(_exp2((s - higher) * scale))
            highest = higher
        # As in the kernel above: if rounding alone would cap as many as the budget, they stay free.
        allowed = count < budget
        shift = tl.where(allowed, highest, shift)
        peak = tl.where(allowed, (budget - count) / total, peak)
        cut, edge = shift - tl.log2(peak) / scale, shift
        searching = allowed & (peak > 1)
    return shift, tl.minimum(peak, 1.0)


@triton.jit
def _free_weights(s, shift, peak, scale):
    """Weights of the entries that are not capped, 0 of the others; NaN of NaN."""
    weights = _exp2((s - shift) * scale) * peak
    return tl.where(weights > ONE, 0.0, weights)


@triton.jit
def _exact_backward(
    grad_weights, rows, saved, grad_scores, grad_budget, R, n, scale, inverse_eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, exists, offset, inside = _place(R, n, ROWS, BLOCK)
    s = _load(rows, offset, inside, float("-inf"), WHOLE)
    g = _load(grad_weights, offset, inside, 0.0, WHOLE)
    shift = tl.load(saved + row, mask=exists, other=LOWEST)
    peak = tl.load(saved + R + row, mask=exists, other=1.0)
    free = _free_weights(s, shift[:, None], peak[:, None], scale)
    mass, weighted = _sums(free, free * g)
    delta = tl.where(mass == 0, 0.0, weighted / tl.where(mass == 0, 1.0, mass))
    _store(grad_scores, offset, free * inverse_eps * (g - delta[:, None]), inside, WHOLE)
    tl.store(grad_budget + row, delta, mask=exists)


@triton.jit
def _exact_backward_parts(
    grad_weights, rows, saved, grad_scores, grad_budget, R, n, scale, inverse_eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    shift, peak = tl.load(saved + row), tl.load(saved + R + row)
    mass, weighted = 0.0, 0.0
    for start in range(0, n, BLOCK):
        s = _load(rows + row * n + start, column, column < n - start, float("-inf"))
        g = _load(grad_weights + row * n + start, column, column < n - start, 0.0)
        free = _free_weights(s, shift, peak, scale)
        mass += tl.sum(free, 0)
        weighted += tl.sum(free * g, 0)
    delta = tl.where(mass == 0, 0.0, weighted / tl.where(mass == 0, 1.0, mass))
    for start in range(0, n, BLOCK):
        s = _load(rows + row * n + start, column, column < n - start, float("-inf"))
        g = _load(grad_weights + row * n + start, column, column < n - start, 0.0)
        free = _free_weights(s, shift, peak, scale)
        _store(grad_scores + row * n + start, column, free * inverse_eps * (g - delta), column < n - start)
    tl.store(grad_budget + row, delta)


# The iterative solver (cda_cli.ops.iterative) on d = s − max(s) and a + max(s): the iteration is the same, and fewer
# digits are lost. Since s + b = min(s, −a), its exponentials are min(e, cut) for e = exp((d − origin)/ε) and one number
# per row, cut = exp((−a − origin)/ε): as long as ε stays, no iteration needs new ones. A masked score is FAR below all.


@triton.jit
def _load_scores(pointer, offset, inside, WHOLE: tl.constexpr = False):
    s = _load(pointer, offset, inside, FAR, WHOLE)
    return tl.where(s == float("-inf"), FAR, s)


@triton.jit
def _visible(s):
    """1 for each entry that is not masked; NaN of NaN."""
    return tl.where(s <= 0.5 * FAR, 0.0, tl.where(s == s, 1.0, s))


@triton.jit
def _finite_or_0(top):
    return tl.where(top <= 0.5 * FAR, 0.0, top)


@triton.jit
def _next_a(log_k, origin, total, eps):
    """ε(log k − logsumexp), from exponentials relative to `origin`; logarithms of base 2; a blind row has sum 0."""
    return eps * (1 / LOG2E) * (log_k - tl.log2(tl.where(total == 0, 1.0, total))) - origin


@triton.jit
def _is_near(level, origin, scale):
    """Whether all rows have exponentials that still reach: min(d, −a) is within FAINT of their origin."""
    return tl.max(tl.abs(level - origin), 0) * scale < 40


@triton.jit
def _exponentials(d, origin, scale):
    return _exp2(tl.minimum((d - origin[:, None]) * scale, HIGHEST))


@triton.jit(do_not_specialize=["n_iters"])
def _iterative_forward(
    rows, budgets, steps, weights, history, R, n, n_iters, last_eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, exists, offset, inside = _place(R, n, ROWS, BLOCK)
    s = _load_scores(rows, offset, inside, WHOLE)
    top = _finite_or_0(tl.max(s, 1))
    # b starts as −s: every exponent is 0.
    visible = tl.sum(_visible(s), 1)
    log_k = tl.log2(tl.maximum(tl.load(budgets + row, mask=exists, other=1.0), LEAST_BUDGET)) + 0 * visible
    eps = tl.load(steps)
    a = _next_a(log_k, -top, visible, eps)
    history += row
    tl.store(history, a - top, mask=exists)
    d = s - top[:, None]
    origin, scale = tl.zeros_like(top), 0.0
    e = tl.zeros_like(d)
    for t in range(1, n_iters):
        eps = tl.load(steps + t)
        level = tl.minimum(-a, 0.0)
        if (scale != LOG2E / eps) | ~_is_near(level, origin, scale):
            origin, scale = level, LOG2E / eps
            e = _exponentials(d, origin, scale)
        cut = _exp2((-a - origin) * scale)
        a = _next_a(log_k, origin, tl.sum(tl.minimum(e, cut[:, None]), 1), eps)
        history += R
        tl.store(history, a - top, mask=exists)
    level = tl.minimum(-a, 0.0)
    if (scale != LOG2E / last_eps) | ~_is_near(level, origin, scale):
        origin, scale = level, LOG2E / last_eps
        e = _exponentials(d, origin, scale)
    values = e * _exp2((a + origin) * scale)[:, None]
    _store(weights, offset, tl.minimum(values, 1.0, propagate_nan=tl.PropagateNan.ALL), inside, WHOLE)


@triton.jit(do_not_specialize=["n_iters"])
def _iterative_forward_parts(rows, budgets, steps, weights, history, R, n, n_iters, last_eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    top, visible = FAR + 0.0, 0.0
    for start in range(0, n, BLOCK):
        s = _load_scores(rows + row * n + start, column, column < n - start)
        top = tl.maximum(top, tl.max(s, 0))
        visible += tl.sum(_visible(s), 0)
    top = _finite_or_0(top)
    log_k = tl.log2(tl.maximum(tl.load(budgets + row), LEAST_BUDGET)) + 0 * visible
    a = _next_a(log_k, -top, visible, tl.load(steps))
    history += row
    tl.store(history, a - top)
    for t in range(1, n_iters):
        eps = tl.load(steps + t)
        level, total = tl.minimum(-a, 0.0), 0.0
        for start in range(0, n, BLOCK):
            s = _load_scores(rows + row * n + start, column, column < n - start)
            total += tl.sum(_exp2((tl.minimum(s - top, -a) - level) * (LOG2E / eps)), 0)
        a = _next_a(log_k, level, total, eps)
        history += R
        tl.store(history, a - top)
    for start in range(0, n, BLOCK):
        s = _load_scores(rows + row * n + start, column, column < n - start)
        _store(weights + row * n + start, column, _weights(s - top, a, last_eps), column < n - start)


@triton.jit
def _weights(d, a, last_eps):
    return _exp2(tl.minimum(d + a, 0.0, propagate_nan=tl.PropagateNan.ALL) * (LOG2E / last_eps))


# Backwards, ∂L/∂a of a step is the share of the next one's that goes through the entries with s + a > 0; the others
# pass theirs on to ∂L/∂s. So a step leaves one number per row and changes no other entry of ∂L/∂s:
#     ∂s −= ∂a·p over the entries with s + a ≤ 0,   ∂a ← ∂a·Σ p over those with s + a > 0,   p = softmax((s + b)/ε).
# With exponentials e that last for several steps, ∂s −= e·sent, where each step adds its factor to `sent`.


@triton.jit(do_not_specialize=["n_iters"])
def _iterative_backward(
    grad_weights, rows, budgets, history, steps, grad_scores, grad_budget, R, n, n_iters, last_eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, exists, offset, inside = _place(R, n, ROWS, BLOCK)
    s = _load_scores(rows, offset, inside, WHOLE)
    g = _load(grad_weights, offset, inside, 0.0, WHOLE)
    top = _finite_or_0(tl.max(s, 1))
    d = s - top[:, None]
    history += row + (n_iters - 1).to(tl.int64) * R
    a = tl.load(history, mask=exists, other=0.0) + top
    grad = tl.where(d + a[:, None] > 0, 0.0, _weights(d, a[:, None], last_eps) * g / last_eps)
    grad_a = tl.sum(grad, 1)
    grad_log_k = tl.load(steps + n_iters - 1) * grad_a
    origin, scale = tl.zeros_like(top), 0.0
    e, sent = tl.zeros_like(d), tl.zeros_like(d)
    for back in range(1, n_iters):
        t = n_iters - 1 - back
        history -= R
        a = tl.load(history, mask=exists, other=0.0) + top
        eps = tl.load(steps + t + 1)
        level = tl.minimum(-a, 0.0)
        if (scale != LOG2E / eps) | ~_is_near(level, origin, scale):
            grad -= e * sent
            origin, scale, sent = level, LOG2E / eps, tl.zeros_like(d)
            e = _exponentials(d, origin, scale)
        free = _saturated(level[:, None] - d, SHARP, 1.0)  # 1 where s + a ≤ 0, else 0
        count, rest = _sums(free, free * e)
        passed = (BLOCK - count) * _exp2((level - origin) * scale)
        total = passed + rest
        factor = grad_a / tl.where(total == 0, 1.0, total)
        sent += free * factor[:, None]
        grad_a = factor * passed
        grad_log_k += tl.load(steps + t) * grad_a
    _store(grad_scores, offset, grad - e * sent, inside, WHOLE)
    budget = tl.load(budgets + row, mask=exists, other=1.0)
    tl.store(grad_budget + row, grad_log_k / tl.maximum(budget, LEAST_BUDGET), mask=exists)


@triton.jit(do_not_specialize=["n_iters"])
def _iterative_backward_parts(
    grad_weights, rows, budgets, history, steps, grad_scores, grad_budget, factors, R, n, n_iters, last_eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    last = row + (n_iters - 1).to(tl.int64) * R
    top, grad_a = FAR + 0.0, 0.0
    for start in range(0, n, BLOCK):
        s = _load_scores(rows + row * n + start, column, column < n - start)
        top = tl.maximum(top, tl.max(s, 0))
    top = _finite_or_0(top)
    last_a = tl.load(history + last) + top
    for start in range(0, n, BLOCK):
        d = _load_scores(rows + row * n + start, column, column < n - start) - top
        g = _load(grad_weights + row * n + start, column, column < n - start, 0.0)
        grad_a += tl.sum(tl.where(d + last_a > 0, 0.0, _weights(d, last_a, last_eps) * g / last_eps), 0)
    grad_log_k = tl.load(steps + n_iters - 1) * grad_a
    place = last
    for back in range(1, n_iters):
        t = n_iters - 1 - back
        place -= R
        a = tl.load(history + place) + top
        scale = LOG2E / tl.load(steps + t + 1)
        level, count, rest = tl.minimum(-a, 0.0), 0.0, 0.0
        for start in range(0, n, BLOCK):
            d = _load_scores(rows + row * n + start, column, column < n - start) - top
            count += tl.sum(tl.where(d > level, 1.0, 0.0), 0)
            rest += tl.sum(tl.where(d > level, 0.0, _exp2((d - level) * scale)), 0)
        total = count + rest
        factor = grad_a / tl.where(total == 0, 1.0, total)
        tl.store(factors + place, factor)
        grad_a = factor * count
        grad_log_k += tl.load(steps + t) * grad_a
    tl.debug_barrier()  # every thread reads below what one has stored above
    for start in range(0, n, BLOCK):
        d = _load_scores(rows + row * n + start, column, column < n - start) - top
        g = _load(grad_weights + row * n + start, column, column < n - start, 0.0)
        grad = tl.where(d + last_a > 0, 0.0, _weights(d, last_a, last_eps) * g / last_eps)
        place = last
        for back in range(1, n_iters):
            place -= R
            level = tl.minimum(-(tl.load(history + place) + top), 0.0)
            scale = LOG2E / tl.load(steps + n_iters - back)
            grad -= tl.where(d > level, 0.0, _exp2((d - level) * scale) * tl.load(factors + place))
        _store(grad_scores + row * n + start, column, grad, column < n - start)
    budget = tl.load(budgets + row)
    tl.store(grad_budget + row, grad_log_k / tl.maximum(budget, LEAST_BUDGET))
