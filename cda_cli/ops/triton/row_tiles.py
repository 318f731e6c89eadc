"""What the row kernels share: which entries a program holds, their loads and stores, and arithmetic."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import INTERPRETED, rounded

# A weight up to here is 1 to rounding, and its entry stays free. The k-th entry is one, if k is an integer and ε small.
ONE = tl.constexpr(1 + 2.0**-20)
# So steep is the multiply-add that stands for a comparison.
SHARP = tl.constexpr(2.0**60)


@triton.jit
def place_rows(R, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The rows [ROWS] of this program, which of them exist, the offsets of their entries, and which of these exist."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    return row, row < R, row[:, None] * n + column[None, :], (row < R)[:, None] & (column < n)[None, :]


@triton.jit
def load_entries(pointer, offset, inside, absent, WHOLE: tl.constexpr = False):
    """The entries in float32. WHOLE says that all of them are inside."""
    if WHOLE:
        return tl.load(pointer + offset).to(tl.float32)
    return tl.load(pointer + offset, mask=inside, other=absent).to(tl.float32)


@triton.jit
def store_entries(pointer, offset, values, inside, WHOLE: tl.constexpr = False):
    values = rounded(values, pointer.dtype.element_ty)
    if WHOLE:
        tl.store(pointer + offset, values)
    else:
        tl.store(pointer + offset, values, mask=inside)


@triton.jit
def exp2(x):
    """2^x, and 0 where that is below 2^−126. Smaller numbers would cost three instructions more."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def log2(x):
    """The logarithm, to 2^−22, and that of 0 below 2^−126. `tl.log2` takes twenty instructions, one after another."""
    if INTERPRETED:
        return tl.log2(tl.where(x < 2.0**-126, 0.0, x))
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def saturated(a, b, c):
    """a·b + c, held between 0 and 1, and 0 for NaN. It is one instruction of the least busy pipe."""
    if INTERPRETED:
        value = (a.to(tl.float64) * b + c).to(tl.float32)  # The product alone may be beyond float32.
        return tl.where(value == value, tl.minimum(tl.maximum(value, 0.0), 1.0), 0.0)
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [a, b, c], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def sums(a, b):
    """The sums of both over each row, by one reduction."""
    if INTERPRETED:  # The interpreter reduces pairs entry by entry.
        return tl.sum(a, 1), tl.sum(b, 1)
    return tl.reduce((a, b), 1, _add_pairs)


@triton.jit
def capped_and_free(e, y, BLOCK: tl.constexpr):
    """How many of the BLOCK entries of a row have y·e above 1 (to rounding), and the sum of the e of the others.

    The comparison is a multiply-add, SHARP·(1 − y·e), held to 1 or 0. Its product is not rounded. y ≤ 2⁶⁰.
    """
    free = saturated(e, -(y * (SHARP / ONE))[:, None], SHARP)
    count, rest = sums(free, free * e)
    return BLOCK - count, rest


@triton.jit
def any_of(condition):
    return tl.max(condition.to(tl.int32), 0) > 0
