"""The row operator in Triton: both solvers, one read of the row and one write.

A row of up to `REGISTER_LIMIT` scores is held in registers, by one program (several short rows share one); a longer
one is read again, in parts, for every step of its solver. Scores are float32, bf16 or fp16, −inf where masked; the
arithmetic is float32. What is saved is what the PyTorch path saves, so that either backward can follow.

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

REGISTER_LIMIT = 16384  # of n: 16 warps hold the scores and their exponentials, 32 of each per thread
PART = 4096  # entries of a longer row that are read at a time

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # the shift of a row with nothing free, as in cda_cli.ops.dual
# exp(−28): a sum of exponentials below it has lost digits of its terms, and soon the terms.
SMALL = tl.constexpr(1e-12)
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
            _exact_forward_parts[(R,)](rows, budget, weights, saved, R, n, scale, BLOCK=PART, num_warps=8)
        elif R:
            ROWS, BLOCK, num_warps = _tile(n, entries_per_thread=32)
            _exact_forward[(triton.cdiv(R, ROWS),)](
                rows, budget, weights, saved, R, n, scale, ROWS=ROWS, BLOCK=BLOCK, num_warps=num_warps
            )
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
            _exact_backward_parts[(R,)](*tensors, R, n, scale, 1 / eps, BLOCK=PART, num_warps=8)
        elif R:
            ROWS, BLOCK, num_warps = _tile(n, entries_per_thread=32)
            _exact_backward[(triton.cdiv(R, ROWS),)](
                *tensors, R, n, scale, 1 / eps, ROWS=ROWS, BLOCK=BLOCK, num_warps=num_warps
            )
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
            _iterative_forward_parts[(R,)](*tensors, R, n, len(eps_steps), last_eps, BLOCK=PART, num_warps=8)
        elif R:
            ROWS, BLOCK, num_warps = _tile(n, entries_per_thread=16)
            _iterative_forward[(triton.cdiv(R, ROWS),)](
                *tensors, R, n, len(eps_steps), last_eps, ROWS=ROWS, BLOCK=BLOCK, num_warps=num_warps
            )
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
            _iterative_backward_parts[(R,)](*tensors, factors, R, n, len(eps_steps), last_eps, BLOCK=PART, num_warps=8)
        elif R:
            ROWS, BLOCK, num_warps = _tile(n, entries_per_thread=16)
            _iterative_backward[(triton.cdiv(R, ROWS),)](
                *tensors, R, n, len(eps_steps), last_eps, ROWS=ROWS, BLOCK=BLOCK, num_warps=num_warps
            )
    return grad_scores, grad_budget


def _tile(n: int, entries_per_thread: int) -> tuple[int, int, int]:
    """(rows of a program, entries of a row, warps of a program); a program has 512 entries at least, or 32 rows.

    Chosen so that the kernel spills no registers on sm_90.
    """
    block: int = triton.next_power_of_2(n)
    rows = min(32, max(1, 512 // block))
    return rows, block, min(16, max(1, rows * block // (32 * entries_per_thread)))


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
def _load(pointer, offset, inside, absent):
    return tl.load(pointer + offset, mask=inside, other=absent).to(tl.float32)


@triton.jit
def _store(pointer, offset, values, inside):
    tl.store(pointer + offset, rounded(values, pointer.dtype.element_ty), mask=inside)


@triton.jit
def _exponentials(s, shift, scale):
    """exp((s − shift)/ε) of the entries up to `shift`, 0 of those above it; NaN of NaN."""
    return tl.where(s > shift, 0.0, tl.exp2((s - shift) * scale))


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def _beyond(e, cut):
    """How many e exceed `cut` [ROWS], and the sum of the others: both by one reduction."""
    above = e > cut[:, None]
    if INTERPRETED:  # it reduces pairs entry by entry
        return tl.sum(tl.where(above, 1.0, 0.0), 1), tl.sum(tl.where(above, 0.0, e), 1)
    return tl.reduce((tl.where(above, 1.0, 0.0), tl.where(above, 0.0, e)), 1, _add_pairs)


@triton.jit
def _normal_cut(s, visible, budget, shift, scale):
    """The e of the smallest capped score, if its scores were normal with the mean and deviation that they have.

    A first step of Newton from any guess lands left of the solution, since F is concave; from a near one it lands near,
    which saves most of the steps. Of n normal scores n·(Q(t) + (ε/σ)·φ(t)) = k at the threshold t, and φ/Q ≈ t + 1/2
    there; Q⁻¹ by formula 26.2.22 of Abramowitz and Stegun.
    """
    seen = s > float("-inf")
    mean = tl.sum(tl.where(seen, s, 0.0), 1) / visible
    spread = tl.where(seen, s - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(spread * spread, 1) / visible) + 1e-30
    share = tl.minimum(budget / visible, 0.4)
    threshold = _normal_quantile(share)
    share /= 1 + (threshold + 0.5) * 1.4427 / (scale * deviation)
    return tl.exp2((mean + deviation * _normal_quantile(share) - shift) * scale)


@triton.jit
def _normal_quantile(share):
    """t with Q(t) = share, to 3e-3, for shares up to 1/2."""
    x = tl.sqrt(-2.0 * tl.log(share))
    return x - (2.30753 + 0.27061 * x) / (1.0 + x * (0.99229 + 0.04481 * x))


@triton.jit
def _exact_forward(rows, budgets, weights, saved, R, n, scale, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, exists, offset, inside = _place(R, n, ROWS, BLOCK)
    s = _load(rows, offset, inside, float("-inf"))
    budget = tl.load(budgets + row, mask=exists, other=1.0)
    visible = tl.sum(tl.where(s > float("-inf"), 1.0, 0.0), 1)
    full = visible <= budget
    shift = tl.where(full, LOWEST, tl.max(s, 1))
    e = _exponentials(s, shift[:, None], scale)
    m = tl.zeros_like(budget)
    peak = budget / tl.sum(e, 1)
    active = (peak > 1) & ~full
    first_cut = 1 / peak
    if tl.max(tl.where(active, budget, 0.0), 0) > 4:
        reached, rest = _beyond(e, _normal_cut(s, visible, budget, shift, scale))
        guess = rest / (budget - reached)
        first_cut = tl.where((reached < budget) & (rest > SMALL), tl.minimum(first_cut, guess), first_cut)
    while tl.max(active.to(tl.int32), 0) > 0:
        # Newton on e, which needs no further exponential: an entry is capped if its e exceeds that of weight 1.
        cut, accepted, count = first_cut, tl.full([ROWS], float("inf"), tl.float32), m
        searching = active
        while tl.max(searching.to(tl.int32), 0) > 0:
            reached, rest = _beyond(e, cut)
            reached += m
            # Always fewer than the budget in exact arithmetic. Rounding alone can break that, and only where the
            # entries in question are all 1 to rounding: they stay free.
            more = searching & (reached > count) & (reached < budget)
            accepted, count = tl.where(more, cut, accepted), tl.where(more, reached, count)
            searching = more & (rest > SMALL)
            cut = tl.where(searching, rest / (budget - reached), cut)
        # Once more from the largest free score, for all digits, and because what follows may have underflowed.
        progress = active & (count > m)
        free = (e <= accepted[:, None]) & (s <= shift[:, None])
        shift = tl.where(progress, tl.max(tl.where(free, s, float("-inf")), 1), shift)
        m = tl.where(progress, count, m)
        e = _exponentials(s, shift[:, None], scale)
        peak = (budget - m) / tl.sum(e, 1)
        first_cut = 1 / peak
        active = progress & (peak > 1)
    peak = tl.where(full | (peak > 1), 1.0, peak)
    _store(weights, offset, tl.where(s > shift[:, None], 1.0, e * peak[:, None]), inside)
    tl.store(saved + row, shift, mask=exists)
    tl.store(saved + R + row, peak, mask=exists)


@triton.jit
def _exact_forward_parts(rows, budgets, weights, saved, R, n, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    budget = tl.load(budgets + row)
    visible = 0.0
    for start in range(0, n, BLOCK):
        s = _load(rows + row * n + start, column, column < n - start, float("-inf"))
        visible += tl.sum(tl.where(s > float("-inf"), 1.0, 0.0), 0)
    lowest = tl.full([], LOWEST, tl.float32)
    shift, peak = lowest, 1.0
    # An entry is capped above `cut`, the score of weight 1, and from `edge` on, the largest score that was free.
    cut, edge = float("inf"), float("inf")
    searching = visible > budget
    while searching:
        top, total, count = lowest, 0.0, 0.0
        for start in range(0, n, BLOCK):
            s = _load(rows + row * n + start, column, column < n - start, float("-inf"))
            capped = (s > cut) | (s >= edge)
            count += tl.sum(tl.where(capped, 1.0, 0.0), 0)
            s = tl.where(capped, float("-inf"), s)
            higher = tl.maximum(top, tl.max(s, 0))
            total = total * tl.exp2((top - higher) * scale) + tl.sum(tl.exp2((s - higher) * scale), 0)
            top = higher
        # As in the kernel above: if rounding alone would cap as many as the budget, they stay free.
        allowed = count < budget
        shift = tl.where(allowed, top, shift)
        peak = tl.where(allowed, (budget - count) / total, peak)
        cut, edge = shift - tl.log2(peak) / scale, shift
        searching = allowed & (peak > 1)
    peak = tl.where(peak > 1, 1.0, peak)
    for start in range(0, n, BLOCK):
        s = _load(rows + row * n + start, column, column < n - start, float("-inf"))
        values = tl.where(s > shift, 1.0, _exponentials(s, shift, scale) * peak)
        _store(weights + row * n + start, column, values, column < n - start)
    tl.store(saved + row, shift)
    tl.store(saved + R + row, peak)


@triton.jit
def _exact_backward(
    grad_weights, rows, saved, grad_scores, grad_budget, R, n, scale, inverse_eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, exists, offset, inside = _place(R, n, ROWS, BLOCK)
    s = _load(rows, offset, inside, float("-inf"))
    g = _load(grad_weights, offset, inside, 0.0)
    shift = tl.load(saved + row, mask=exists, other=LOWEST)
    peak = tl.load(saved + R + row, mask=exists, other=1.0)
    free = _exponentials(s, shift[:, None], scale) * peak[:, None]
    mass = tl.sum(free, 1)
    delta = tl.where(mass == 0, 0.0, tl.sum(free * g, 1) / tl.where(mass == 0, 1.0, mass))
    _store(grad_scores, offset, free * inverse_eps * (g - delta[:, None]), inside)
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
        free = _exponentials(s, shift, scale) * peak
        mass += tl.sum(free, 0)
        weighted += tl.sum(free * g, 0)
    delta = tl.where(mass == 0, 0.0, weighted / tl.where(mass == 0, 1.0, mass))
    for start in range(0, n, BLOCK):
        s = _load(rows + row * n + start, column, column < n - start, float("-inf"))
        g = _load(grad_weights + row * n + start, column, column < n - start, 0.0)
        free = _exponentials(s, shift, scale) * peak
        _store(grad_scores + row * n + start, column, free * inverse_eps * (g - delta), column < n - start)
    tl.store(grad_budget + row, delta)


# The iterative solver, in the published order of operations and with its division: at a small ε their rounding is the
# largest part of the result's error (see cda_cli.ops.iterative). A masked score is FAR below all others, where −inf
# would make NaN of a division's remainder.


@triton.jit
def _load_scores(pointer, offset, inside):
    s = _load(pointer, offset, inside, FAR)
    return tl.where(s == float("-inf"), FAR, s)


@triton.jit
def _visible(s):
    """1 for each entry that is not masked; NaN of NaN."""
    return tl.where(s <= 0.5 * FAR, 0.0, tl.where(s == s, 1.0, s))


@triton.jit
def _divide(x, eps):
    """x/ε rounded to nearest: the quotient by the reciprocal, and its remainder once more, for half the instructions.

    Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990.
    """
    if INTERPRETED:  # it has no fused multiply-add
        return tl.div_rn(x, eps)
    inverse = tl.div_rn(1.0, eps)
    quotient = x * inverse
    return tl.fma(tl.fma(-quotient, eps, x), inverse, quotient)


@triton.jit
def _scaled(s, a, eps):
    """(s + b)/ε with b = −relu(s + a); NaN stays NaN."""
    return _divide(s - tl.maximum(s + a, 0.0, propagate_nan=tl.PropagateNan.ALL), eps)


@triton.jit
def _next_a(log_k, largest, total, eps):
    """ε(log k − logsumexp), from the largest exponent and the sum relative to it; a row without entries has sum 0."""
    return eps * (log_k - (largest + tl.log(tl.where(total == 0, 1.0, total))))


@triton.jit
def _finite_or_0(top):
    return tl.where(top <= 0.5 * FAR, 0.0, top)


@triton.jit
def _weights(s, a, last_eps):
    return tl.exp(_divide(tl.minimum(s + a, 0.0, propagate_nan=tl.PropagateNan.ALL), last_eps))


@triton.jit(do_not_specialize=["n_iters"])
def _iterative_forward(
    rows, budgets, steps, weights, history, R, n, n_iters, last_eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, exists, offset, inside = _place(R, n, ROWS, BLOCK)
    s = _load_scores(rows, offset, inside)
    log_k = tl.log(tl.maximum(tl.load(budgets + row, mask=exists, other=1.0), LEAST_BUDGET))
    top = _finite_or_0(tl.max(s, 1))
    # b starts as −s: every exponent is 0.
    visible = tl.sum(_visible(s), 1)
    a = _next_a(log_k, 0.0, visible, tl.load(steps))
    history += row
    tl.store(history, a, mask=exists)
    for t in range(1, n_iters):
        eps = tl.load(steps + t)
        largest = _scaled(top, a, eps)
        total = tl.sum(tl.exp(_scaled(s, a[:, None], eps) - largest[:, None]), 1)
        a = _next_a(log_k, largest, total, eps)
        history += R
        tl.store(history, a, mask=exists)
    _store(weights, offset, _weights(s, a[:, None], last_eps), inside)


@triton.jit(do_not_specialize=["n_iters"])
def _iterative_forward_parts(rows, budgets, steps, weights, history, R, n, n_iters, last_eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    log_k = tl.log(tl.maximum(tl.load(budgets + row), LEAST_BUDGET))
    top, visible = FAR + 0.0, 0.0
    for start in range(0, n, BLOCK):
        s = _load_scores(rows + row * n + start, column, column < n - start)
        top = tl.maximum(top, tl.max(s, 0))
        visible += tl.sum(_visible(s), 0)
    top = _finite_or_0(top)
    a = _next_a(log_k, 0.0, visible, tl.load(steps))
    history += row
    tl.store(history, a)
    for t in range(1, n_iters):
        eps = tl.load(steps + t)
        largest, total = _scaled(top, a, eps), 0.0
        for start in range(0, n, BLOCK):
            s = _load_scores(rows + row * n + start, column, column < n - start)
            total += tl.sum(tl.exp(_scaled(s, a, eps) - largest), 0)
        a = _next_a(log_k, largest, total, eps)
        history += R
        tl.store(history, a)
    for start in range(0, n, BLOCK):
        s = _load_scores(rows + row * n + start, column, column < n - start)
        _store(weights + row * n + start, column, _weights(s, a, last_eps), column < n - start)


# Backwards, ∂L/∂a of a step is the share of the next one's that goes through the entries with s + a > 0; the others
# pass theirs on to ∂L/∂s. So a step leaves one number per row and changes no other entry of ∂L/∂s:
#     ∂s −= ∂a·p over the entries with s + a ≤ 0,   ∂a ← ∂a·Σ p over those with s + a > 0,   p = softmax((s + b)/ε).


@triton.jit(do_not_specialize=["n_iters"])
def _iterative_backward(
    grad_weights, rows, budgets, history, steps, grad_scores, grad_budget, R, n, n_iters, last_eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, exists, offset, inside = _place(R, n, ROWS, BLOCK)
    s = _load_scores(rows, offset, inside)
    g = _load(grad_weights, offset, inside, 0.0)
    top = _finite_or_0(tl.max(s, 1))
    history += row + (n_iters - 1).to(tl.int64) * R
    a = tl.load(history, mask=exists, other=0.0)
    grad = tl.where(s + a[:, None] > 0, 0.0, _weights(s, a[:, None], last_eps) * g / last_eps)
    grad_a = tl.sum(grad, 1)
    grad_log_k = tl.load(steps + n_iters - 1) * grad_a
    for back in range(1, n_iters):
        t = n_iters - 1 - back
        history -= R
        a = tl.load(history, mask=exists, other=0.0)
        eps = tl.load(steps + t + 1)
        e = tl.exp(_scaled(s, a[:, None], eps) - _scaled(top, a, eps)[:, None])
        passed = tl.sum(tl.where(s + a[:, None] > 0, e, 0.0), 1)
        total = tl.sum(e, 1)
        factor = grad_a / tl.where(total == 0, 1.0, total)
        grad -= tl.where(s + a[:, None] > 0, 0.0, e * factor[:, None])
        grad_a = factor * passed
        grad_log_k += tl.load(steps + t) * grad_a
    _store(grad_scores, offset, grad, inside)
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
    last_a = tl.load(history + last)
    top, grad_a = FAR + 0.0, 0.0
    for start in range(0, n, BLOCK):
        s = _load_scores(rows + row * n + start, column, column < n - start)
        g = _load(grad_weights + row * n + start, column, column < n - start, 0.0)
        top = tl.maximum(top, tl.max(s, 0))
        grad_a += tl.sum(tl.where(s + last_a > 0, 0.0, _weights(s, last_a, last_eps) * g / last_eps), 0)
    top = _finite_or_0(top)
    grad_log_k = tl.load(steps + n_iters - 1) * grad_a
    place = last
    for back in range(1, n_iters):
        t = n_iters - 1 - back
        place -= R
        a = tl.load(history + place)
        eps = tl.load(steps + t + 1)
        largest, total, passed = _scaled(top, a, eps), 0.0, 0.0
        for start in range(0, n, BLOCK):
            s = _load_scores(rows + row * n + start, column, column < n - start)
            e = tl.exp(_scaled(s, a, eps) - largest)
            total += tl.sum(e, 0)
            passed += tl.sum(tl.where(s + a > 0, e, 0.0), 0)
        factor = grad_a / tl.where(total == 0, 1.0, total)
        tl.store(factors + place, factor)
        grad_a = factor * passed
        grad_log_k += tl.load(steps + t) * grad_a
    tl.debug_barrier()  # every thread reads below what one has stored above
    for start in range(0, n, BLOCK):
        s = _load_scores(rows + row * n + start, column, column < n - start)
        g = _load(grad_weights + row * n + start, column, column < n - start, 0.0)
        grad = tl.where(s + last_a > 0, 0.0, _weights(s, last_a, last_eps) * g / last_eps)
        place = last
        for back in range(1, n_iters):
            place -= R
            a = tl.load(history + place)
            eps = tl.load(steps + n_iters - back)
            e = tl.exp(_scaled(s, a, eps) - _scaled(top, a, eps))
            grad -= tl.where(s + a > 0, 0.0, e * tl.load(factors + place))
        _store(grad_scores + row * n + start, column, grad, column < n - start)
    budget = tl.load(budgets + row)
    tl.store(grad_budget + row, grad_log_k / tl.maximum(budget, LEAST_BUDGET))
