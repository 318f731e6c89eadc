"""The kernels of norm and rotation.

A program has some rows, one position each, of queries or of keys. It takes their heads one after the other, so that it
reads the angles once for all of them.

With x a head, y = R(gain · x̂), x̂ = x·r and r = 1/√(mean x² + eps), where R turns channel i with i + D/2:

    ∂L/∂x = r·(u − x̂·mean(u·x̂)),   u = gain · R⁻¹(∂L/∂y),   ∂L/∂gain = Σ x̂ · R⁻¹(∂L/∂y)

In the kernels a head is two tiles [ROWS, HALF], of its first D/2 channels and of the others. Of the G heads of a
projection the first H are those of queries, and K each those of keys and values.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import rounded

SIZES = ("T", "rows_total")  # No kernel is compiled anew for these: texts of many lengths are usual.


@triton.jit
def _load_halves(base, inside, channels, D: tl.constexpr):
    mask = inside[:, None] & (channels < D // 2)[None, :]
    pointers = base[:, None] + channels[None, :]
    first = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointers + D // 2, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_halves(base, first, second, inside, channels, D: tl.constexpr):
    mask = inside[:, None] & (channels < D // 2)[None, :]
    pointers = base[:, None] + channels[None, :]
    tl.store(pointers, rounded(first, base.dtype.element_ty), mask=mask)
    tl.store(pointers + D // 2, rounded(second, base.dtype.element_ty), mask=mask)


@triton.jit
def _load_angles(cos, sin, positions, inside, channels, D: tl.constexpr):
    """The cosines and sines of the channels below D/2. The first half of the table `sin` is negative."""
    mask = inside[:, None] & (channels < D // 2)[None, :]
    offsets = positions[:, None] * D + channels[None, :]
    return tl.load(cos + offsets, mask=mask, other=0.0), tl.load(sin + offsets + D // 2, mask=mask, other=0.0)


@triton.jit
def _load_gain(gain, channels, D: tl.constexpr):
    mask = channels < D // 2
    first = tl.load(gain + channels, mask=mask, other=0.0)
    return first[None, :], tl.load(gain + D // 2 + channels, mask=mask, other=0.0)[None, :]


@triton.jit
def _reciprocal_rms(first, second, eps, D: tl.constexpr):
    return tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D + eps)[:, None]


@triton.jit
def _turn(source, gain, cos, sin, target, eps, position, inside, channels, HEADS: tl.constexpr, D: tl.constexpr):
    cos_half, sin_half = _load_angles(cos, sin, position, inside, channels, D)
    gain_first, gain_second = _load_gain(gain, channels, D)
    for head in range(HEADS):
        first, second = _load_halves(source + head * D, inside, channels, D)
        r = _reciprocal_rms(first, second, eps, D)
        first, second = first * r * gain_first, second * r * gain_second
        turned_first, turned_second = first * cos_half - second * sin_half, second * cos_half + first * sin_half
        _store_halves(target + head * D, turned_first, turned_second, inside, channels, D)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    projected, query_gain, key_gain, cos, sin, query, key, eps, T, rows_total,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The second dimension of the grid has two parts: queries and keys."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, channels, position = rows < rows_total, tl.arange(0, HALF), rows % T
    source = projected + rows * (G * D)
    if tl.program_id(1) == 0:
        _turn(source, query_gain, cos, sin, query + rows * (H * D), eps, position, inside, channels, H, D)
    else:
        _turn(source + H * D, key_gain, cos, sin, key + rows * (K * D), eps, position, inside, channels, K, D)


@triton.jit
def _copy(source, stride, target, inside, channels, HEADS: tl.constexpr, D: tl.constexpr):
    for head in range(HEADS):
        first, second = _load_halves(source + head * stride, inside, channels, D)
        _store_halves(target + head * D, first, second, inside, channels, D)


@triton.jit
def _turn_back(
    grad, stride, source, gain, cos, sin, target, sums, eps, position, inside, channels,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    cos_half, sin_half = _load_angles(cos, sin, position, inside, channels, D)
    gain_first, gain_second = _load_gain(gain, channels, D)
    sum_first = tl.zeros([ROWS, HALF], tl.float32)
    sum_second = tl.zeros([ROWS, HALF], tl.float32)
    for head in range(HEADS):
        first, second = _load_halves(source + head * D, inside, channels, D)
        turned_first, turned_second = _load_halves(grad + head * stride, inside, channels, D)
        r = _reciprocal_rms(first, second, eps, D)
        first, second = first * r, second * r
        back_first = turned_first * cos_half + turned_second * sin_half
        back_second = turned_second * cos_half - turned_first * sin_half
        sum_first += first * back_first
        sum_second += second * back_second
        back_first, back_second = back_first * gain_first, back_second * gain_second
        mean = ((tl.sum(first * back_first, 1) + tl.sum(second * back_second, 1)) / D)[:, None]
        grad_first, grad_second = r * (back_first - first * mean), r * (back_second - second * mean)
        _store_halves(target + head * D, grad_first, grad_second, inside, channels, D)
    tl.store(sums + channels, tl.sum(sum_first, 0), mask=channels < D // 2)
    tl.store(sums + D // 2 + channels, tl.sum(sum_second, 0), mask=channels < D // 2)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad_query, grad_key, grad_value, grad_rest, projected, query_gain, key_gain, cos, sin, grad_projected, gain_parts,
    eps, stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_rb, stride_rt, stride_rh, T, rows_total,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The second dimension of the grid has up to four parts.

    Parts 0 and 1 compute the gradients of queries and keys, and gain_parts [2, blocks of rows, D], the sums of the
    gain's gradient over the rows of each program. Parts 2 and 3 copy the gradients of values and rest.
    """
    block, part = tl.program_id(0), tl.program_id(1)
    rows = block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside, channels = rows < rows_total, tl.arange(0, HALF)
    batch, position = rows // T, rows % T
    source, target = projected + rows * (G * D), grad_projected + rows * (G * D)
    sums = gain_parts + (part * tl.num_programs(0) + block) * D
    if part == 0:
        _turn_back(
            grad_query + batch * stride_qb + position * stride_qt, stride_qh, source, query_gain, cos, sin, target,
            sums, eps, position, inside, channels, H, D, HALF, ROWS,
        )  # fmt: skip
    elif part == 1:
        _turn_back(
            grad_key + batch * stride_kb + position * stride_kt, stride_kh, source + H * D, key_gain, cos, sin,
            target + H * D, sums, eps, position, inside, channels, K, D, HALF, ROWS,
        )  # fmt: skip
    elif part == 2:
        values = grad_value + batch * stride_vb + position * stride_vt
        _copy(values, stride_vh, target + (H + K) * D, inside, channels, K, D)
    else:
        rest = grad_rest + batch * stride_rb + position * stride_rt
        _copy(rest, stride_rh, target + (H + 2 * K) * D, inside, channels, G - H - 2 * K, D)
