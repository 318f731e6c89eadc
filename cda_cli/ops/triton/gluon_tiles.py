"""What the attention forward kernels in Gluon share: tiles in flight, and the keys that a query sees.

A program has groups of four warps that compute, each for its own rows of queries, and a warp that loads tiles of keys
and values for all of them. Gluon (triton.experimental.gluon) comes with Triton. It has no interpreter.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# All warps of a program that compute wait here for each other; Triton 3.7 has another name for it. A kernel calls it
# before `warp_specialize`, which writes the arguments of the groups of warps where a reduction has left its result.
# Triton 3.6 does not wait until all warps have read that result. A late warp would read an argument in its place, and
# then overwrite the arguments with what follows from it.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def bounds(
    first_ptr, last_ptr, rows, T, S, CAUSAL: gl.constexpr, RANGES: gl.constexpr, OUTSIDE: gl.constexpr
):  # fmt: skip
    """The keys [first, last) that each query of `rows` sees. A row past T sees all, or with OUTSIDE nothing."""
    if RANGES:
        inside = rows < T
        first = gl.load(first_ptr + rows, mask=inside, other=S if OUTSIDE else 0).to(gl.int32)
        last = gl.load(last_ptr + rows, mask=inside, other=0 if OUTSIDE else S).to(gl.int32)
    else:
        first = rows * 0
        last = gl.minimum(gl.maximum(rows + (S - T + 1), 0), S) if CAUSAL else first + S
    return first, last


@gluon.jit
def load_tiles(
    query, key, value, q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
    batch, head, key_head, block, low, count, M: gl.constexpr, N: gl.constexpr, GROUPS: gl.constexpr,
):  # fmt: skip
    """What the loading warp does: queries once, then keys and values from the last tile to the first."""
    STAGES: gl.constexpr = k_bufs.type.shape[0]
    for c in gl.static_range(GROUPS):
        mbarrier.expect(q_full.index(c), query.block_type.nbytes)
        tma.async_copy_global_to_shared(
            query, [batch, head, (block * GROUPS + c) * M, 0], q_full.index(c), q_bufs.index(c)
        )  # fmt: skip
    for i in range(count):
        stage, phase = i % STAGES, (i // STAGES) & 1
        start = low + (count - 1 - i) * N
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), key.block_type.nbytes)
        tma.async_copy_global_to_shared(key, [batch, key_head, start, 0], k_full.index(stage), k_bufs.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), value.block_type.nbytes)
        tma.async_copy_global_to_shared(value, [batch, key_head, start, 0], v_full.index(stage), v_bufs.index(stage))


@gluon.jit
def buffers(query, key, value, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """Shared memory for the queries of each group and for tiles in flight, and the barriers of each."""
    M: gl.constexpr = query.block_type.shape[2]
    N: gl.constexpr = key.block_type.shape[2]
    WIDTH: gl.constexpr = key.block_type.shape[3]
    q_bufs = gl.allocate_shared_memory(query.dtype, [GROUPS, 1, 1, M, WIDTH], query.layout)
    k_bufs = gl.allocate_shared_memory(key.dtype, [STAGES, 1, 1, N, WIDTH], key.layout)
    v_bufs = gl.allocate_shared_memory(value.dtype, [STAGES, 1, 1, N, WIDTH], value.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=GROUPS)
        mbarrier.init(v_empty.index(i), count=GROUPS)
    return q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty


@gluon.jit
def place_of_program(T, rows_total, heads, span, ROWS: gl.constexpr):
    """The block of ROWS queries of a program, and its place among the heads of all batches, in the batch, and there.

    `span` query heads are computed at a time, so that their keys and values stay in the cache of the GPU. Of those, the
    last queries go first, because they see the most keys of a causal sequence.
    """
    blocks = gl.cdiv(T, ROWS)
    program = gl.program_id(0)
    spans = program // (span * blocks)
    within = program % (span * blocks)
    at_a_time = gl.minimum(span, rows_total // T - spans * span)
    block = blocks - 1 - within // at_a_time
    row = spans * span + within % at_a_time
    return block, row, row // heads, row % heads


@gluon.jit
def tiles_of_block(
    first_ptr, last_ptr, block, T, S, ROWS: gl.constexpr, N: gl.constexpr, CAUSAL: gl.constexpr, RANGES: gl.constexpr
):  # fmt: skip
    """The first key of the tiles that some query of the block sees, and their number, at least 1."""
    # 256 rows where the block has 192: the size of a tensor is a power of two.
    POWER: gl.constexpr = 128 if ROWS == 128 else 256
    rows = block * ROWS + gl.arange(0, POWER, layout=gl.BlockedLayout([1], [32], [4], [0])) % ROWS
    first, last = bounds(first_ptr, last_ptr, rows, T, S, CAUSAL, RANGES, True)
    low = gl.min(first, 0) // N * N
    return low, gl.maximum(gl.cdiv(gl.max(last, 0) - low, N), 1)


@gluon.jit
def where_seen(x, other, start, first, last, full_low, full_high, L: gl.constexpr, RANGES: gl.constexpr):
    """x [M, N] of the tile of keys from `start` on, and `other` where a query does not see the key.

    All queries see the keys [full_low, full_high).
    """
    M: gl.constexpr = x.shape[0]
    N: gl.constexpr = x.shape[1]
    if (start < full_low) | (start + N > full_high):
        # Eights of columns are numbers in the instructions. Columns would be kept in registers over all tiles.
        wide = gl.reshape(x, [M, N // 8, 8])
        EIGHTS: gl.constexpr = gl.SliceLayout(2, wide.type.layout)
        eights = gl.arange(0, N // 8, layout=gl.SliceLayout(0, EIGHTS))[None, :, None] * 8
        within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, wide.type.layout)))[None, None, :]
        end = gl.convert_layout(last - start, gl.SliceLayout(1, EIGHTS), assert_trivial=True)
        seen = eights < end[:, None, None] - within
        if RANGES:
            begin = gl.convert_layout(first - start, gl.SliceLayout(1, EIGHTS), assert_trivial=True)
            seen &= eights >= begin[:, None, None] - within
        x = gl.convert_layout(gl.reshape(gl.where(seen, wide, other), [M, N]), L, assert_trivial=True)
    return x
