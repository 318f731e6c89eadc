"""The kernels around attention in a step of decoding, in which every row of the batch has one position, and the draw.

A step computes little, so its time is that of its launches. Each of these kernels takes the place of several.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import rounded


@triton.jit
def add_norm_kernel(
    x, branch, gain, bias, total, normed, eps,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ADDS: tl.constexpr, CENTRES: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """total = x + branch, with ADDS, and its norm, for a row [C]. CENTRES subtracts the mean, as LayerNorm does."""
    row, columns = tl.program_id(0).to(tl.int64) * C, tl.arange(0, BLOCK_C)
    inside = columns < C
    values = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        added = tl.load(branch + row + columns, mask=inside, other=0.0).to(tl.float32)
        sums = rounded(values + added, total.dtype.element_ty)
        tl.store(total + row + columns, sums, mask=inside)
        values = sums.to(tl.float32)
    if CENTRES:
        values = tl.where(inside, values - tl.sum(values, 0) / C, 0.0)
    result = values * tl.rsqrt(tl.sum(values * values, 0) / C + eps) * tl.load(gain + columns, mask=inside, other=0.0)
    if BIAS:
        result += tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(normed + row + columns, rounded(result, normed.dtype.element_ty), mask=inside)


@triton.jit
def _store_halves(target, first, second, channels, HALF: tl.constexpr, D: tl.constexpr):
    kind = target.dtype.element_ty
    tl.store(target + channels, rounded(first, kind), mask=channels < HALF)
    tl.store(target + HALF + channels, rounded(second, kind), mask=channels + HALF < D)


@triton.jit(do_not_specialize=("null_keys",))
def step_heads_kernel(
    projected, lengths, query_gain, key_gain, cos, sin, query_scale, budget_bias, query, keys, values, budgets,
    eps, most, null_keys, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    H: tl.constexpr, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    NORMS: tl.constexpr, ROTATES: tl.constexpr, SCALES: tl.constexpr, BUDGETS: tl.constexpr,
):  # fmt: skip
    """One head of one row: a query goes to `query` [rows, H, D], a key or a value to its slot of the cache.

    A head is two tiles, of its first ⌈D/2⌉ channels and of the others, since rotation turns channel i with i + D/2.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(lengths + row)
    channels = tl.arange(0, BLOCK)
    in_first, in_second = channels < HALF, channels + HALF < D
    source = projected + (row * G + head) * D
    first = tl.load(source + channels, mask=in_first, other=0.0).to(tl.float32)
    second = tl.load(source + HALF + channels, mask=in_second, other=0.0).to(tl.float32)
    if head < H + K:
        if NORMS:
            gain = query_gain
            if head >= H:
                gain = key_gain
            r = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + eps)
            first = first * r * tl.load(gain + channels, mask=in_first, other=0.0)
            second = second * r * tl.load(gain + HALF + channels, mask=in_second, other=0.0)
        if ROTATES:
            cos_half = tl.load(cos + position * D + channels, mask=in_first, other=0.0)
            sin_half = tl.load(sin + position * D + HALF + channels, mask=in_second, other=0.0)
            first, second = first * cos_half - second * sin_half, second * cos_half + first * sin_half
    if head < H:
        if SCALES:
            scale = tl.load(query_scale)
            first, second = first * scale, second * scale
        _store_halves(query + (row * H + head) * D, first, second, channels, HALF, D)
        if BUDGETS:
            packed = projected + row * (G * D) + (H + 2 * K) * D
            logit = tl.load(packed + head).to(tl.float32) + tl.load(budget_bias + head).to(tl.float32)
            tl.store(budgets + row * H + head, 1 + (most - 1) * tl.sigmoid(logit))
    elif head < H + K:
        place = row * stride_kb + (head - H) * stride_kh + (position + null_keys) * stride_ks
        _store_halves(keys + place, first, second, channels, HALF, D)
    else:
        place = row * stride_vb + (head - H - K) * stride_vh + (position + null_keys) * stride_vs
        _store_halves(values + place, first, second, channels, HALF, D)


@triton.jit
def _weights(logits, columns, V, best, temperature):
    values = tl.load(logits + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
    return tl.exp((values - best).to(tl.float64) / temperature)


@triton.jit(do_not_specialize=("stride", "V"))
def draw_kernel(
    logits, temperatures, greedy, uniforms, counts, tokens, stride, V, UNIFORMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The token of a row: the first whose sum of exponentials, with those before it, passes the uniform share."""
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    logits += row.to(tl.int64) * stride
    best, token = tl.full([], float("-inf"), tl.float32), tl.full([], 0, tl.int32)
    for start in range(0, V, BLOCK):
        values = tl.load(logits + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        largest, place = tl.max(values, 0, return_indices=True)
        token = tl.where(largest > best, start + place, token)
        best = tl.maximum(best, largest)
    if tl.load(greedy + row).to(tl.int32) == 0:
        temperature = tl.load(temperatures + row)
        total = tl.full([], 0.0, tl.float64)
        for start in range(0, V, BLOCK):
            total += tl.sum(_weights(logits, start + columns, V, best, temperature), 0)
        threshold = tl.load(uniforms + row * UNIFORMS + tl.load(counts + row) % UNIFORMS) * total
        before, found = tl.full([], 0.0, tl.float64), tl.full([], 0, tl.int32) + V
        for start in range(0, V, BLOCK):
            weights = _weights(logits, start + columns, V, best, temperature)
            # Sums are added in parallel, so they may fall by a rounding error where a weight is 0.
            passes = (before + tl.cumsum(weights, 0) > threshold) & (weights > 0)
            found = tl.minimum(found, tl.min(tl.where(passes, start + columns, V), 0))
            token = tl.maximum(token, tl.max(tl.where(weights > 0, start + columns, 0), 0))
            before += tl.sum(weights, 0)
        token = tl.minimum(token, found)  # It is the last one with a weight, if rounding leaves none.
    tl.store(tokens + row, token.to(tl.int64))
