"""The second pass of the attention forward for any k, for the matrix units of compute capability 9.0.

It computes what `output_kernel` does, which is its twin elsewhere, in Gluon: groups of warps compute, each for its own
rows, while another warp loads tiles of keys and values for all. The dual is known, so nothing is rescaled.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from . import row_tiles, tiles
from .gluon_tiles import barrier, bounds, buffers, load_tiles, place_of_program, tiles_of_block, where_seen

BEYOND = gl.constexpr(tiles.BEYOND.value)
SHARP = gl.constexpr(row_tiles.SHARP.value)
ALL = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def _capped(powers, edge):
    """1 where a power [M, N] is above the margin of its row, and else 0; `edge` [M] is −SHARP·margin.

    Nothing hidden is above it: −∞ and an infinite edge add up to NaN, for which the instruction gives 0.
    """
    L: gl.constexpr = powers.type.layout
    sharp = gl.full(powers.shape, SHARP, gl.float32, layout=L)
    edge = gl.expand_dims(edge, 1) + gl.full(powers.shape, 0.0, gl.float32, layout=L)
    return gl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [powers, sharp, edge], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def _weights(
    scores, start, first, last, full_low, full_high, base, factor, L: gl.constexpr, RANGES: gl.constexpr
):  # fmt: skip
    """The weights [M, N] of a tile, and their powers of two before the cap."""
    scale = gl.full(scores.shape, 0.0, gl.float32, layout=L) + factor
    powers = gl.fma(scores, scale, gl.expand_dims(base, 1) + gl.full(scores.shape, 0.0, gl.float32, layout=L))
    powers = where_seen(powers, float("-inf"), start, first, last, full_low, full_high, L, RANGES)
    return gl.exp2(gl.minimum(powers, 0.0, propagate_nan=ALL)), powers


@gluon.jit
def _attend(
    c: gl.constexpr, stats, first_ptr, last_ptr, output, free_output,
    q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
    stride_ot, row, block, low, count, T, S, rows_total, factor,
    D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, GROUPS: gl.constexpr, SPLIT: gl.constexpr,
    CAUSAL: gl.constexpr, RANGES: gl.constexpr,
):  # fmt: skip
    """What a group of four warps does: M rows of queries against all tiles, from the last to the first."""
    STAGES: gl.constexpr = k_bufs.type.shape[0]
    WIDTH: gl.constexpr = q_bufs.type.shape[4]
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    R: gl.constexpr = gl.SliceLayout(1, L)
    A: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    dtype: gl.constexpr = q_bufs.dtype
    rows = (block * GROUPS + c) * M + gl.arange(0, M, layout=R)
    first, last = bounds(first_ptr, last_ptr, rows, T, S, CAUSAL, RANGES, False)
    full_low, full_high = gl.max(first, 0), gl.min(last, 0)
    position = stats + row.to(gl.int64) * T + rows
    peak = gl.load(position + rows_total, mask=rows < T, other=-BEYOND)
    base = peak - gl.load(position, mask=rows < T, other=0.0) * factor
    zero = gl.full([M, N], 0.0, gl.float32, layout=L)
    weighted = gl.full([M, WIDTH], 0.0, gl.float32, layout=LO)
    q = q_bufs.index(c).reshape((M, WIDTH))

    start = low + (count - 1) * N
    mbarrier.wait(q_full.index(c), 0)
    mbarrier.wait(k_full.index(0), 0)
    token = warpgroup_mma(
        q, k_bufs.index(0).reshape((N, WIDTH)).permute((1, 0)), zero, use_acc=False, is_async=True
    )  # fmt: skip
    scores = warpgroup_mma_wait(0, deps=[token])
    mbarrier.arrive(k_empty.index(0), count=1)
    w, powers = _weights(scores, start, first, last, full_low, full_high, base, factor, L, RANGES)
    if SPLIT:
        capped = gl.full([M, WIDTH], 0.0, gl.float32, layout=LO)
        edge = gl.load(position + 2 * rows_total, mask=rows < T, other=BEYOND) * -SHARP
        ones = _capped(powers, edge)
        w -= ones
        one = gl.convert_layout(ones.to(dtype), A)
    p = gl.convert_layout(w.to(dtype), A)
    mbarrier.wait(v_full.index(0), 0)
    for i in range(1, count):
        stage, phase = i % STAGES, (i // STAGES) & 1
        before = (i - 1) % STAGES
        start = low + (count - 1 - i) * N
        mbarrier.wait(k_full.index(stage), phase)
        token = warpgroup_mma(
            q, k_bufs.index(stage).reshape((N, WIDTH)).permute((1, 0)), zero, use_acc=False, is_async=True
        )  # fmt: skip
        sums = warpgroup_mma(p, v_bufs.index(before).reshape((N, WIDTH)), weighted, is_async=True)
        if SPLIT:
            capped_sums = warpgroup_mma(one, v_bufs.index(before).reshape((N, WIDTH)), capped, is_async=True)
            scores = warpgroup_mma_wait(2, deps=[token])
        else:
            scores = warpgroup_mma_wait(1, deps=[token])
        mbarrier.arrive(k_empty.index(stage), count=1)
        w, powers = _weights(scores, start, first, last, full_low, full_high, base, factor, L, RANGES)
        # Here, between the weights and the wait for the product, it keeps the assembler from moving that wait up.
        mbarrier.wait(v_full.index(stage), phase)
        if SPLIT:
            ones = _capped(powers, edge)
            w -= ones
            weighted, capped, w, ones = warpgroup_mma_wait(0, deps=[sums, capped_sums, w, ones])
            one = gl.convert_layout(ones.to(dtype), A)
        else:
            weighted, w = warpgroup_mma_wait(0, deps=[sums, w])
        mbarrier.arrive(v_empty.index(before), count=1)
        p = gl.convert_layout(w.to(dtype), A)
    stage = (count - 1) % STAGES
    sums = warpgroup_mma(p, v_bufs.index(stage).reshape((N, WIDTH)), weighted, is_async=True)
    if SPLIT:
        capped_sums = warpgroup_mma(one, v_bufs.index(stage).reshape((N, WIDTH)), capped, is_async=True)
        weighted, capped = warpgroup_mma_wait(0, deps=[sums, capped_sums])
    else:
        weighted = warpgroup_mma_wait(0, deps=[sums])

    rows = gl.convert_layout(rows, gl.SliceLayout(1, LO), assert_trivial=True)
    channels = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LO))
    mask = (rows < T)[:, None] & (channels < D)[None, :]
    places = rows[:, None].to(gl.int64) * stride_ot + channels[None, :]
    if SPLIT:
        gl.store(free_output + places, weighted.to(dtype), mask=mask)
        weighted += capped
    gl.store(output + places, weighted.to(dtype), mask=mask)


@gluon.jit(do_not_specialize=(*tiles.SIZES, "group", "span"))
def weighted_sum_kernel(
    query,
    key,
    value,
    stats,
    first_ptr,
    last_ptr,
    output,
    free_output,
    factor,
    stride_ob,
    stride_oh,
    stride_ot,
    heads,
    group,
    T,
    S,
    rows_total,
    span,
    D: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPS: gl.constexpr,
    SPLIT: gl.constexpr,
    CAUSAL: gl.constexpr,
    RANGES: gl.constexpr,
):
    """Writes output and free_output [B, H, T, D] as `output_kernel` does.

    `query`, `key` and `value` are descriptors of blocks [1, 1, M or N, padded D]; GROUPS is 2 or 3.
    """
    q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty = buffers(query, key, value, GROUPS, STAGES)
    block, row, batch, head = place_of_program(T, rows_total, heads, span, GROUPS * M)
    key_head = head // group
    first_ptr += batch * T
    last_ptr += batch * T
    low, count = tiles_of_block(first_ptr, last_ptr, block, T, S, GROUPS * M, N, CAUSAL, RANGES)
    place_o = batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    output += place_o
    free_output += place_o
    barrier()
    if GROUPS == 2:
        gl.warp_specialize([
            (_attend, (
                gl.constexpr(0), stats, first_ptr, last_ptr, output, free_output,
                q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
                stride_ot, row, block, low, count, T, S, rows_total, factor, D, M, N, GROUPS, SPLIT, CAUSAL, RANGES,
            )),
            (_attend, (
                gl.constexpr(1), stats, first_ptr, last_ptr, output, free_output,
                q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
                stride_ot, row, block, low, count, T, S, rows_total, factor, D, M, N, GROUPS, SPLIT, CAUSAL, RANGES,
            )),
            (load_tiles, (
                query, key, value, q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
                batch, head, key_head, block, low, count, M, N, GROUPS,
            )),
        ], [4, 1], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_attend, (
                gl.constexpr(0), stats, first_ptr, last_ptr, output, free_output,
                q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
                stride_ot, row, block, low, count, T, S, rows_total, factor, D, M, N, GROUPS, SPLIT, CAUSAL, RANGES,
            )),
            (_attend, (
                gl.constexpr(1), stats, first_ptr, last_ptr, output, free_output,
                q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
                stride_ot, row, block, low, count, T, S, rows_total, factor, D, M, N, GROUPS, SPLIT, CAUSAL, RANGES,
            )),
            (_attend, (
                gl.constexpr(2), stats, first_ptr, last_ptr, output, free_output,
                q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
                stride_ot, row, block, low, count, T, S, rows_total, factor, D, M, N, GROUPS, SPLIT, CAUSAL, RANGES,
            )),
            (load_tiles, (
                query, key, value, q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
                batch, head, key_head, block, low, count, M, N, GROUPS,
            )),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
