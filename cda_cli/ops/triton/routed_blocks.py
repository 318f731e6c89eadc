"""The kernels of a feed-forward that is routed to blocks of units, for rows that select few of them.

Σ_b λ_b · down_b · relu²(up_b · x) for each row. A program is at once done with a block whose λ does not exceed the
tolerance, and a masked load reads nothing, so the weights of that block stay in memory. The grid does not depend on
what is selected, so a CUDA graph may hold the launches; every sum has one order, whatever the other rows are.

Names inside kernels: C channels of the residual stream, N blocks of SIZE units each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import rounded


@triton.jit
def _selected(factor, tolerance):
    """A λ that is NaN is selected, so that it reaches the output."""
    return ~(factor <= tolerance)


@triton.jit(do_not_specialize=("rows",))
def routed_units_kernel(
    x, factors, up, up_bias, units, read, tolerance, rows,
    C: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_C: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Stores λ · relu²(up · x) of BLOCK_U units of one row in `units` [rows, N·SIZE], float32, if their λ is selected.

    With COUNTS, the first number of `read` grows by the blocks that any of the rows selects, and the second by N.
    """
    block, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    row = tl.program_id(1).to(tl.int64)
    if COUNTS:  # noqa: SIM102 - Triton knows it when it compiles, and the row is known later
        if (row == 0) & (part == 0):
            each = tl.arange(0, ROWS)
            of_rows = tl.load(factors + each * N + block, mask=each < rows, other=float("-inf")).to(tl.float32)
            tl.atomic_add(read, tl.max(_selected(of_rows, tolerance).to(tl.int64), 0), sem="relaxed")
            tl.atomic_add(read + 1, tl.full([], 1, tl.int64), sem="relaxed")
    factor = tl.load(factors + row * N + block).to(tl.float32)
    if _selected(factor, tolerance):
        places = part * BLOCK_U + tl.arange(0, BLOCK_U)
        inside = places < SIZE
        places += block * SIZE
        products = tl.zeros([BLOCK_U, BLOCK_C], tl.float32)
        for start in range(0, C, BLOCK_C):
            channels = start + tl.arange(0, BLOCK_C)
            of_row = tl.load(x + row * C + channels, mask=channels < C, other=0.0).to(tl.float32)
            weights = tl.load(
                up + places.to(tl.int64)[:, None] * C + channels[None, :],
                mask=inside[:, None] & (channels < C)[None, :], other=0.0,
            )  # fmt: skip
            products += weights.to(tl.float32) * of_row[None, :]
        value = tl.sum(products, 1)
        if BIAS:
            value += tl.load(up_bias + places, mask=inside, other=0.0).to(tl.float32)
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(units + row * (N * SIZE) + places, factor * value * value, mask=inside)


@triton.jit
def routed_sum_kernel(
    units, factors, down, down_bias, output, tolerance,
    C: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Stores BLOCK_C channels of one row: `down` [C, N·SIZE] times the units of the blocks that it selects.

    A tile has many blocks, so that the loads for all of them are on the way together. They are a dimension of it, by
    which Triton sees that neighbouring units have one mask, and loads several of them at a time.
    """
    row = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    unit = tl.arange(0, BLOCK_S)
    products = tl.zeros([BLOCK_C, BLOCK_N, BLOCK_S], tl.float32)
    for start in range(0, N, BLOCK_N):
        blocks = start + tl.arange(0, BLOCK_N)
        factor = tl.load(factors + row * N + blocks, mask=blocks < N, other=float("-inf")).to(tl.float32)
        selected = _selected(factor, tolerance)[:, None] & (unit < SIZE)[None, :]
        places = blocks[:, None] * SIZE + unit[None, :]
        values = tl.load(units + row * (N * SIZE) + places, mask=selected, other=0.0)
        weights = tl.load(
            down + channels.to(tl.int64)[:, None, None] * (N * SIZE) + places[None, :, :],
            mask=(channels < C)[:, None, None] & selected[None, :, :], other=0.0,
        )  # fmt: skip
        products += weights.to(tl.float32) * values[None, :, :]
    result = tl.sum(tl.sum(products, 2), 1)
    if BIAS:
        result += tl.load(down_bias + channels, mask=channels < C, other=0.0).to(tl.float32)
    tl.store(output + row * C + channels, rounded(result, output.dtype.element_ty), mask=channels < C)
