"""The iterative solver's row kernels, forward and backward: rows in registers, and longer ones in parts.

Shapes: R rows, n entries; [ROWS, BLOCK] tensors, or [BLOCK] where the row comes in parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .row_tiles import SHARP, exp2, load_entries, place_rows, saturated, store_entries, sums

LOG2E = tl.constexpr(math.log2(math.e))
# About exp(28), the reach of one shift. An entry of weight 1 that lies further below has an exponent with lost digits.
FAINT = tl.constexpr(2.0**40)
FAINT_LOG2 = tl.constexpr(40.0)
HIGHEST = tl.constexpr(100.0)  # An entry whose exponent is higher is certainly capped.
LEAST_BUDGET = tl.constexpr(1e-20)
MOST_BUDGET = tl.constexpr(torch.finfo(torch.float32).max)
FAR = tl.constexpr(-1e20)


# The kernels iterate as `solvers/iterative.py` does, but on d = s − max(s) and a + max(s), which loses fewer digits.
# Since s + b = min(s, −a), the exponentials are min(e, cut), for e = exp((d − origin)/ε) and one number per row,
# cut = exp((−a − origin)/ε). While ε stays the same, no iteration needs new ones, and the next cut is their sum divided
# by k. It does not come from a, whose rounding a small ε enlarges in each iteration. A masked score lies FAR below all.


@triton.jit
def _load_scores(pointer, offset, inside, WHOLE: tl.constexpr = False):
    s = load_entries(pointer, offset, inside, FAR, WHOLE)
    return tl.where(s == float("-inf"), FAR, s)


@triton.jit
def _visible(s):
    """1 for each entry that is not masked. NaN stays NaN."""
    return tl.where(s <= 0.5 * FAR, 0.0, tl.where(s == s, 1.0, s))


@triton.jit
def finite_or_0(top):
    return tl.where(top <= 0.5 * FAR, 0.0, top)


@triton.jit
def held_budget(budget):
    """The budget within what divides and has a logarithm. One that is not above 0 gives NaN."""
    return tl.where(budget > 0, tl.minimum(tl.maximum(budget, LEAST_BUDGET), MOST_BUDGET), float("nan"))


@triton.jit
def _next_a(log_k, origin, total, eps):
    """ε(log k − logsumexp), from exponentials relative to `origin`. A row that sees nothing has sum 0."""
    return eps * (1 / LOG2E) * (log_k - tl.log2(tl.where(total == 0, 1.0, total))) - origin


@triton.jit
def _is_near(level, origin, scale):
    """Whether the exponentials still reach: the min(d, −a) of a row lies within FAINT of their origin."""
    return tl.abs(level - origin) * scale < FAINT_LOG2


@triton.jit
def _are_near(level, origin, scale):
    """Whether they do in all rows."""
    return tl.max(tl.abs(level - origin), 0) * scale < FAINT_LOG2


@triton.jit
def _exponentials(above_origin, scale):
    return exp2(tl.minimum(above_origin * scale, HIGHEST))


@triton.jit
def _next_cut(budget, total):
    """exp((−a − origin)/ε) of the next a, by a sum of exponentials relative to `origin`."""
    return tl.where(total == 0, 1.0, total) / budget


@triton.jit(do_not_specialize=["n_iters"])
def iterative_forward_kernel(
    rows, budgets, steps, weights, history, R, n, n_iters, last_eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, exists, offset, inside = place_rows(R, n, ROWS, BLOCK)
    s = _load_scores(rows, offset, inside, WHOLE)
    top = finite_or_0(tl.max(s, 1))
    # b starts as −s, so every exponent is 0.
    visible = tl.sum(_visible(s), 1)
    budget = held_budget(tl.load(budgets + row, mask=exists, other=1.0)) + 0 * visible
    log_k = tl.log2(budget)
    eps = tl.load(steps)
    a = _next_a(log_k, -top, visible, eps)
    history += row
    tl.store(history, a - top, mask=exists)
    d = s - top[:, None]
    origin, scale = tl.zeros_like(top), 0.0
    e, cut = tl.zeros_like(d), tl.zeros_like(top)
    for t in range(1, n_iters):
        eps = tl.load(steps + t)
        level = tl.minimum(-a, 0.0)
        if (scale != LOG2E / eps) | ~_are_near(level, origin, scale):
            origin, scale = level, LOG2E / eps
            e, cut = _exponentials(d - origin[:, None], scale), exp2((-a - origin) * scale)
        total = tl.sum(tl.minimum(e, cut[:, None]), 1)
        a = _next_a(log_k, origin, total, eps)
        cut = _next_cut(budget, total)
        history += R
        tl.store(history, a - top, mask=exists)
    level = tl.minimum(-a, 0.0)
    if (scale != LOG2E / last_eps) | ~_are_near(level, origin, scale):
        origin, scale = level, LOG2E / last_eps
        e, cut = _exponentials(d - origin[:, None], scale), exp2((-a - origin) * scale)
    values = e * (1 / cut)[:, None]
    store_entries(weights, offset, tl.minimum(values, 1.0, propagate_nan=tl.PropagateNan.ALL), inside, WHOLE)


@triton.jit(do_not_specialize=["n_iters"])
def iterative_forward_parts_kernel(
    rows, budgets, steps, weights, history, R, n, n_iters, last_eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    top, visible = FAR + 0.0, 0.0
    for start in range(0, n, BLOCK):
        s = _load_scores(rows + row * n + start, column, column < n - start)
        top = tl.maximum(top, tl.max(s, 0))
        visible += tl.sum(_visible(s), 0)
    top = finite_or_0(top)
    budget = held_budget(tl.load(budgets + row)) + 0 * visible
    log_k = tl.log2(budget)
    a = _next_a(log_k, -top, visible, tl.load(steps))
    history += row
    tl.store(history, a - top)
    origin, scale, cut = 0.0, 0.0, 0.0
    for t in range(1, n_iters):
        eps = tl.load(steps + t)
        level, total = tl.minimum(-a, 0.0), 0.0
        if (scale != LOG2E / eps) | ~_is_near(level, origin, scale):
            origin, scale = level, LOG2E / eps
            cut = exp2((-a - origin) * scale)
        for start in range(0, n, BLOCK):
            s = _load_scores(rows + row * n + start, column, column < n - start)
            total += tl.sum(tl.minimum(_exponentials(s - top - origin, scale), cut), 0)
        a = _next_a(log_k, origin, total, eps)
        cut = _next_cut(budget, total)
        history += R
        tl.store(history, a - top)
    level = tl.minimum(-a, 0.0)
    if (scale != LOG2E / last_eps) | ~_is_near(level, origin, scale):
        origin, scale = level, LOG2E / last_eps
        cut = exp2((-a - origin) * scale)
    for start in range(0, n, BLOCK):
        s = _load_scores(rows + row * n + start, column, column < n - start)
        values = _exponentials(s - top - origin, scale) * (1 / cut)
        values = tl.minimum(values, 1.0, propagate_nan=tl.PropagateNan.ALL)
        store_entries(weights + row * n + start, column, values, column < n - start)


@triton.jit
def weights_of(d, a, last_eps):
    return exp2(tl.minimum(d + a, 0.0, propagate_nan=tl.PropagateNan.ALL) * (LOG2E / last_eps))


# Backwards, ∂L/∂a of a step is the share of that of the next step which goes through the entries with s + a > 0. The
# other entries pass their share on to ∂L/∂s. So a step leaves one number per row, and changes ∂L/∂s at these alone:
#     ∂s −= ∂a·p over the entries with s + a ≤ 0,   ∂a ← ∂a·Σ p over those with s + a > 0,   p = softmax((s + b)/ε).
# Exponentials e last for several steps. Then ∂s −= e·sent, and each step adds its factor to `sent`.


@triton.jit(do_not_specialize=["n_iters"])
def iterative_backward_kernel(
    grad_weights, rows, budgets, history, steps, grad_scores, grad_budget, R, n, n_iters, last_eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    row, exists, offset, inside = place_rows(R, n, ROWS, BLOCK)
    s = _load_scores(rows, offset, inside, WHOLE)
    g = load_entries(grad_weights, offset, inside, 0.0, WHOLE)
    top = finite_or_0(tl.max(s, 1))
    d = s - top[:, None]
    history += row + (n_iters - 1).to(tl.int64) * R
    a = tl.load(history, mask=exists, other=0.0) + top
    grad = tl.where(d + a[:, None] > 0, 0.0, weights_of(d, a[:, None], last_eps) * g / last_eps)
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
        if (scale != LOG2E / eps) | ~_are_near(level, origin, scale):
            grad -= e * sent
            origin, scale, sent = level, LOG2E / eps, tl.zeros_like(d)
            e = _exponentials(d - origin[:, None], scale)
        free = saturated(level[:, None] - d, SHARP, 1.0)  # 1 where s + a ≤ 0, else 0
        count, rest = sums(free, free * e)
        passed = (BLOCK - count) * exp2((level - origin) * scale)
        total = passed + rest
        factor = grad_a / tl.where(total == 0, 1.0, total)
        sent += free * factor[:, None]
        grad_a = factor * passed
        grad_log_k += tl.load(steps + t) * grad_a
    store_entries(grad_scores, offset, grad - e * sent, inside, WHOLE)
    budget = tl.load(budgets + row, mask=exists, other=1.0)
    tl.store(grad_budget + row, grad_log_k / tl.maximum(budget, LEAST_BUDGET), mask=exists)


@triton.jit(do_not_specialize=["n_iters"])
def iterative_backward_parts_kernel(
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
    top = finite_or_0(top)
    last_a = tl.load(history + last) + top
    for start in range(0, n, BLOCK):
        d = _load_scores(rows + row * n + start, column, column < n - start) - top
        g = load_entries(grad_weights + row * n + start, column, column < n - start, 0.0)
        grad_a += tl.sum(tl.where(d + last_a > 0, 0.0, weights_of(d, last_a, last_eps) * g / last_eps), 0)
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
            rest += tl.sum(tl.where(d > level, 0.0, exp2((d - level) * scale)), 0)
        total = count + rest
        factor = grad_a / tl.where(total == 0, 1.0, total)
        tl.store(factors + place, factor)
        grad_a = factor * count
        grad_log_k += tl.load(steps + t) * grad_a
    tl.debug_barrier()  # Below, every thread reads what one thread has stored above.
    for start in range(0, n, BLOCK):
        d = _load_scores(rows + row * n + start, column, column < n - start) - top
        g = load_entries(grad_weights + row * n + start, column, column < n - start, 0.0)
        grad = tl.where(d + last_a > 0, 0.0, weights_of(d, last_a, last_eps) * g / last_eps)
        place = last
        for back in range(1, n_iters):
            place -= R
            level = tl.minimum(-(tl.load(history + place) + top), 0.0)
            scale = LOG2E / tl.load(steps + n_iters - back)
            grad -= tl.where(d > level, 0.0, exp2((d - level) * scale) * tl.load(factors + place))
        store_entries(grad_scores + row * n + start, column, grad, column < n - start)
    budget = tl.load(budgets + row)
    tl.store(grad_budget + row, grad_log_k / tl.maximum(budget, LEAST_BUDGET))
