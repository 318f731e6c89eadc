"""What the attention kernels share: the keys that a query sees, and one tile of scores.

Names inside kernels: M rows of queries, N of keys, D head width (BLOCK_D is the power of two that holds it). Scores are
the raw products q·k; `factor` = scale·log2(e)/ε turns them into powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

# No score is so low. It is finite, so that the difference of two of them is 0 and not NaN.
HIDDEN = tl.constexpr(-1e20)
# It lies beyond every offset and margin, and stands for "every key is capped" or "no key is".
BEYOND = tl.constexpr(1e30)
# No kernel is compiled anew for a value of these arguments: texts of many lengths are usual.
SIZES = ("heads", "key_heads", "T", "S", "rows_total", "duals_total", "duals_length")
# Triton's interpreter multiplies the bit patterns of bf16, and cuts off where a GPU rounds.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def visible_range(rows, T, S, first_ptr, last_ptr, CAUSAL: tl.constexpr, RANGES: tl.constexpr):
    """The keys [first, last) that each query of `rows` sees."""
    if RANGES:
        first = tl.load(first_ptr + rows, mask=rows < T, other=0)
        last = tl.load(last_ptr + rows, mask=rows < T, other=0)
    else:
        first = rows * 0
        last = tl.minimum(tl.maximum(rows + (S - T + 1), 0), S) if CAUSAL else first + S
    return first, last


@triton.jit
def sees(first, last, columns):
    """Which of the keys `columns` each query sees, [queries, keys]."""
    return (columns[None, :] >= first[:, None]) & (columns[None, :] < last[:, None])


@triton.jit
def tile_bounds(first, last, BLOCK_N: tl.constexpr):
    """low, high, full_low, full_high of a block of queries.

    Some query sees a key of [low, high). Every query sees all of the whole tiles [full_low, full_high), which need no
    check; where both are equal, there is no such tile.
    """
    low, high = tl.min(first) // BLOCK_N * BLOCK_N, tl.max(last)
    full_low = (tl.max(first) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_high = tl.maximum(tl.min(last) // BLOCK_N * BLOCK_N, full_low)
    return low, high, full_low, full_high


@triton.jit
def load_tile(base, rows, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK: tl.constexpr):
    """Rows [rows, BLOCK_D] of a matrix whose row `limit` and channel D are the first outside it, with zeros outside."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + channels[None, :]
    if CHECK and BLOCK_D != D:
        return tl.load(pointers, mask=(rows < limit)[:, None] & (channels < D)[None, :], other=0.0)
    if CHECK:
        return tl.load(pointers, mask=(rows < limit)[:, None], other=0.0)
    if BLOCK_D != D:
        return tl.load(pointers, mask=(channels < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def head_of(tensor, stride_b, stride_h, batch, head, BULK: tl.constexpr):
    """One head of a tensor [B, H, rows, D], for `load_block`: its pointer, or with BULK a descriptor and the place."""
    if BULK:
        return tensor, batch, head
    else:  # noqa: RET505 - Triton compiles what follows a return
        return (tensor + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h,)


@triton.jit
def load_block(
    source, start, stride, limit, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr
):
    """Rows [start, start + BLOCK) of one head. With CHECK, rows past `limit` are zeros.

    If `source` is a descriptor, the bulk copy engine reads them; it needs no addresses and no registers of the threads.
    """
    if len(source) == 3:
        return source[0].load([source[1], source[2], start, 0]).reshape(BLOCK, BLOCK_D)
    else:  # noqa: RET505
        return load_tile(source[0], start + tl.arange(0, BLOCK), stride, limit, D, BLOCK_D, CHECK)


@triton.jit
def store_tile(base, rows, stride, limit, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    channels = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + channels[None, :]
    tl.store(pointers, tile, mask=(rows < limit)[:, None] & (channels < D)[None, :])


@triton.jit
def product(left, right):
    """left @ right in float32; float32 operands are not rounded to tf32."""
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def tile_scores(
    q, keys, start, stride, S, first, last,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """q·k of one tile of keys. With CHECK it is HIDDEN where a query does not see the key."""
    k = load_block(keys, start, stride, S, D, BLOCK_D, BLOCK_N, CHECK)
    scores = product(q, tl.trans(k))
    if CHECK:
        visible = sees(first, last, start + tl.arange(0, BLOCK_N))
        scores = tl.where(visible, scores, HIDDEN)
    return scores


@triton.jit
def load_dual(stats, inside, rows_total, factor, dtype: tl.constexpr):
    """shift and peak of rows, as `powers` takes them, and margin. A row outside weighs nothing."""
    shift = tl.load(stats, mask=inside, other=0.0)
    peak = tl.load(stats + rows_total, mask=inside, other=-BEYOND)
    margin = tl.load(stats + 2 * rows_total, mask=inside, other=BEYOND)
    return combined(shift, peak, factor, dtype), peak, margin


@triton.jit
def combined(shift, peak, factor, dtype: tl.constexpr):
    """The shift as `powers` takes it. In half precision it is all that is added to the scaled scores."""
    return shift if dtype == tl.float32 else peak - shift * factor


@triton.jit
def powers(scores, shift, peak, factor, dtype: tl.constexpr):
    """log2 of the weights of `scores` before the cap, factor·(q·k − shift) + peak.

    In float32 the difference comes first, which keeps the digits that |q·k| ≫ |q·k − shift| would cost. In half
    precision one multiply-add is enough, with a shift that is `combined` with the peak.
    """
    return (scores - shift) * factor + peak if dtype == tl.float32 else scores * factor + shift


@triton.jit
def usable(budget):
    """NaN in place of a k that is not above 0, as `dual.usable` has it."""
    return tl.where(budget > 0, budget, float("nan"))


@triton.jit
def budget_of(budget, place, inside, EACH: tl.constexpr):
    """The k of rows: with EACH `budget` points to them, and else it is the k of all."""
    k = tl.load(budget + place, mask=inside, other=1.0) if EACH else tl.zeros(place.shape, tl.float32) + budget
    return usable(k)


@triton.jit
def capped_exp2(power):
    """min(1, exp2(power)). NaN stays NaN, so that a broken query or key shows in the output."""
    return tl.exp2(tl.minimum(power, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 `x` in `dtype`, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
