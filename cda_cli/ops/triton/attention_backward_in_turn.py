"""Attention backward in five products, for the matrix units of compute capability 9.0 (attention_backward.py has the
mathematics).

A program takes a block of keys and goes over the tiles of queries that see them, as `key_value_kernel` does. From the
scores of a tile it computes all three gradients: those of its keys and values stay in its registers, and what its keys
give to the gradient of the queries is added to sums in memory. So that the same inputs always give the same bits,
programs add to a tile of queries in turn: the program of its first keys comes first. A counter of the tile says whose
turn it is.

No program may wait for one that has not started. Programs therefore draw numbers when they start, and the blocks of a
head go to them from the first on: all that have their turns earlier are at work. These blocks are also seen by the most
queries of a causal sequence, so the longest work starts first. Every program goes over the queries from the last to the
first. Programs of one head that start together thus wait one step for each other once, and then never again.

Two groups of four warps compute, half of the keys each, and three more warps do what takes time and no arithmetic: one
loads tiles by the bulk copy engine, one waits for turns, and one says when a turn is over, for which the additions must
have arrived in memory. The kernel is written in Gluon (attention_one_pass.py says why). It has no interpreter, so the
kernels of attention_backward.py and attention_backward_keys.py say what this one computes.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import tiles
from .gluon_tiles import barrier

# min(NaN, 0) is NaN, so that a broken query or key shows in the gradients too.
ALL = gl.constexpr(tl.PropagateNan.ALL)
# Past every query.
FAR = gl.constexpr(2**31 - 1)


@gluon.jit
def _queries_of(keys, low_ptr, high_ptr, T, S, reach, RANGES: gl.constexpr):
    """The queries [low, high) that see each of `keys`, none for a key past S.

    Such a key reads as zeros, but δ would be its ∂L/∂s, which fp16 may not hold, and 0·∞ is NaN.
    """
    inside = keys < S
    if RANGES:
        low = gl.load(low_ptr + keys, mask=inside, other=FAR)
        high = gl.load(high_ptr + keys, mask=inside, other=0)
    else:
        low = gl.where(inside, gl.maximum(keys - reach, 0), FAR)
        high = keys * 0 + T
    return low, high


@gluon.jit
def _tile_of(step, first, count):
    """Of `count` tiles of each head: the head of a step, and its tile, from the last to `first`."""
    return step // count, first + count - 1 - step % count


@gluon.jit
def _load_tiles(
    key, value, query, grad_output, duals, k_buf, v_buf, q_bufs, g_bufs, d_bufs, kv_full, full, added,
    batch, key_head, heads, group, start_n, first, count, rows, M: gl.constexpr,
):  # fmt: skip
    """What the loading warp does: keys and values once, then queries, the gradients of their outputs, and duals."""
    STAGES: gl.constexpr = q_bufs.type.shape[0]
    mbarrier.expect(kv_full, key.block_type.nbytes + value.block_type.nbytes)
    tma.async_copy_global_to_shared(key, [batch, key_head, start_n, 0], kv_full, k_buf)
    tma.async_copy_global_to_shared(value, [batch, key_head, start_n, 0], kv_full, v_buf)
    for step in range(count * group):
        member, tile = _tile_of(step, first, count)
        head, start, stage = key_head * group + member, tile * M, step % STAGES
        # With three stages: the step after the one that had this stage has also used its queries.
        if step >= 2:
            mbarrier.wait(added.index(step & 1), ((step >> 1) - 1) & 1)
        mbarrier.expect(full.index(stage), 2 * query.block_type.nbytes + 3 * duals.block_type.nbytes)
        tma.async_copy_global_to_shared(query, [batch, head, start, 0], full.index(stage), q_bufs.index(stage))
        tma.async_copy_global_to_shared(grad_output, [batch, head, start, 0], full.index(stage), g_bufs.index(stage))
        for part in gl.static_range(3):
            tma.async_copy_global_to_shared(
                duals, [part * rows + batch * heads + head, start], full.index(stage), d_bufs.index(3 * stage + part)
            )


@gluon.jit
def _await_turns(turns, my_turn, ended, block, tiles_of_row, group, first, count):
    """What the waiting warp does. It is at most two steps ahead of the warp that ends turns.

    It acquires once, when its turn has come: every acquire empties the nearest cache of its multiprocessor.
    """
    for step in range(count * group):
        member, tile = _tile_of(step, first, count)
        if step >= 2:
            mbarrier.wait(ended.index(step & 1), ((step >> 1) - 1) & 1)
        gl.inline_asm_elementwise(
            """{
            .reg .pred early;
            .reg .b32 turn;
            again:
            ld.relaxed.gpu.global.b32 turn, [$1];
            setp.lt.s32 early, turn, $2;
            @early bra again;
            ld.acquire.gpu.global.b32 $0, [$1];
            }""",
            "=r,l,r", [(turns + member * tiles_of_row + tile).to(gl.int64), block], dtype=gl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip
        mbarrier.arrive(my_turn.index(step & 1), count=1)


@gluon.jit
def _end_turns(turns, added, ended, tiles_of_row, group, first, count):
    """What the last warp does: once all threads have added to a tile, the next program has its turn.

    The increment is a release, so that no one sees it before the additions.
    """
    for step in range(count * group):
        member, tile = _tile_of(step, first, count)
        mbarrier.wait(added.index(step & 1), (step >> 1) & 1)
        mbarrier.arrive(ended.index(step & 1), count=1)
        gl.atomic_add(turns + member * tiles_of_row + tile, 1, sem="release", scope="gpu")


@gluon.jit
def _weights(scores, d_bufs, stage, start, low, high, full_low, full_high, factor, L: gl.constexpr):
    """λ of a tile [keys, queries], λ of its free entries (0 elsewhere), and δ of its queries."""
    M: gl.constexpr = scores.shape[1]
    C: gl.constexpr = gl.SliceLayout(0, L)
    delta = d_bufs.index(3 * stage).reshape((M,)).load(C)
    shift = d_bufs.index(3 * stage + 1).reshape((M,)).load(C)
    margin = d_bufs.index(3 * stage + 2).reshape((M,)).load(C)
    if (start < full_low) | (start + M > full_high):
        rows = start + gl.arange(0, M, layout=C)
        seen = (rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    power = scores * factor + shift[None, :]
    weights = gl.exp2(gl.minimum(power, 0.0, propagate_nan=ALL))
    # Of `where` the compiler makes masks of bits here, which cost more than the selection.
    free = gl.inline_asm_elementwise(
        "{ .reg .pred free; setp.le.f32 free, $2, $3; selp.f32 $0, $1, 0f00000000, free; }", "=f,f,f,f",
        [weights, power, margin[None, :]], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    return weights, free, delta


@gluon.jit
def _add(sums, total, LQ: gl.constexpr):
    """Adds a tile [queries, channels] to its sums.

    A thread has pairs of channels of the rows r and r + 8. Two such pairs, four numbers, lie side by side in memory,
    and so do those of the 32 threads of a warp.
    """
    M: gl.constexpr = total.shape[0]
    WIDTH: gl.constexpr = total.shape[1]
    rows = gl.arange(0, M, layout=gl.SliceLayout(1, LQ))
    channels = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LQ))
    places = ((rows // 16) * (WIDTH * 16) + rows % 8 * 16)[:, None]
    places += (channels // 8 * 128 + channels % 8 // 2 * 4)[None, :]
    gl.inline_asm_elementwise(
        """red.relaxed.gpu.global.add.v4.f32 [$4], {$8, $9, $10, $11};
        mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;""",
        "=r,=r,=r,=r,l,l,l,l,f,f,f,f", [(sums + places).to(gl.int64), total], dtype=gl.int32, is_pure=False, pack=4,
    )  # fmt: skip


@gluon.jit
def _sum(
    k_buf, v_buf, q_bufs, g_bufs, d_bufs, s_bufs, kv_full, full, my_turn, added, sums, low_ptr, high_ptr,
    grad_key, grad_value, stride_ds, stride_es, start_n, first, count, tiles_of_row, group, factor, unit, T, S, reach,
    D: gl.constexpr, RANGES: gl.constexpr, LATE: gl.constexpr,
):  # fmt: skip
    """What the groups of warps that compute do. The scores are transposed: [keys, queries].

    The gradient of scores goes through shared memory, since the gradient of the queries sums over the keys of both
    groups. With LATE the gradient of the keys gets a tile one step later, while the weights of the next are computed.
    """
    STAGES: gl.constexpr = q_bufs.type.shape[0]
    N: gl.constexpr = k_buf.type.shape[2]
    M: gl.constexpr = q_bufs.type.shape[3]
    WIDTH: gl.constexpr = q_bufs.type.shape[4]
    WARPS: gl.constexpr = N // 16
    SPLIT: gl.constexpr = N // M  # so many groups share the gradient of a query, each with its channels
    dtype: gl.constexpr = q_bufs.dtype
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, M, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, WIDTH, 16])
    LQ: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS // SPLIT, SPLIT], instr_shape=[16, WIDTH // SPLIT, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    PENDING: gl.constexpr = 2 if LATE else 1  # products that need not be done yet where scores or ∂L/∂λ are needed
    k, v = k_buf.reshape((N, WIDTH)), v_buf.reshape((N, WIDTH))
    zero = gl.full([N, M], 0.0, gl.float32, layout=L)
    none = gl.full([M, WIDTH], 0.0, gl.float32, layout=LQ)
    grad_k = gl.full([N, WIDTH], 0.0, gl.float32, layout=LO)
    grad_v = gl.full([N, WIDTH], 0.0, gl.float32, layout=LO)
    columns = start_n + gl.arange(0, N, layout=gl.SliceLayout(1, L))
    low, high = _queries_of(columns, low_ptr, high_ptr, T, S, reach, RANGES)
    # Queries past T read as zeros and weigh nothing, so that the last tile needs no check.
    high = gl.where(high == T, FAR, high)
    full_low, full_high = gl.max(low, 0), gl.min(high, 0)
    tile = first + count - 1
    stage, before, phase = first * 0, first * 0, first * 0
    if LATE:
        s_bufs.index(1).store(zero.to(dtype))
        fence_async_shared()
    mbarrier.wait(kv_full, 0)
    for step in range(count * group):
        q, g = q_bufs.index(stage).reshape((M, WIDTH)), g_bufs.index(stage).reshape((M, WIDTH))
        own = s_bufs.index(step & 1 if LATE else 0)
        mbarrier.wait(full.index(stage), phase)
        s_token = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        p_token = warpgroup_mma(v, g.permute((1, 0)), zero, use_acc=False, is_async=True)
        if LATE:
            q_before = q_bufs.index(before).reshape((M, WIDTH))
            k_token = warpgroup_mma(s_bufs.index((step & 1) ^ 1), q_before, grad_k, is_async=True)
        scores = warpgroup_mma_wait(PENDING, deps=[s_token])
        weights, free, delta = _weights(scores, d_bufs, stage, tile * M, low, high, full_low, full_high, factor, L)
        v_token = warpgroup_mma(gl.convert_layout(weights.to(dtype), A), g, grad_v, is_async=True)
        grad_weights, free = warpgroup_mma_wait(PENDING, deps=[p_token, free])
        grad_scores = (free * (grad_weights - delta[None, :])).to(dtype)
        own.store(grad_scores)
        fence_async_shared()
        if not LATE:
            k_token = warpgroup_mma(gl.convert_layout(grad_scores, A), q, grad_k, is_async=True)
        q_token = warpgroup_mma(own.permute((1, 0)), k, none, use_acc=False, is_async=True)
        grad_v, grad_k, total = warpgroup_mma_wait(0, deps=[v_token, k_token, q_token])
        mbarrier.wait(my_turn.index(step & 1), (step >> 1) & 1)
        _add(sums + tile.to(gl.int64) * (M * WIDTH), total, LQ)
        mbarrier.arrive(added.index(step & 1), count=1)
        last = tile == first
        sums += gl.where(last, tiles_of_row, 0).to(gl.int64) * (M * WIDTH)  # those of the next head
        tile = gl.where(last, first + count, tile) - 1
        before, stage = stage, stage + 1
        phase ^= (stage == STAGES).to(gl.int32)
        stage = gl.where(stage == STAGES, 0, stage)
    if LATE:  # noqa: SIM102 - the compiler leaves out what a constant alone excludes
        if count > 0:
            q_before = q_bufs.index(before).reshape((M, WIDTH))
            k_token = warpgroup_mma(s_bufs.index((count * group - 1) & 1), q_before, grad_k, is_async=True)
            grad_k = warpgroup_mma_wait(0, deps=[k_token])
    rows = start_n + gl.arange(0, N, layout=gl.SliceLayout(1, LO))
    channels = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LO))
    mask = (rows < S)[:, None] & (channels < D)[None, :]
    rows = rows.to(gl.int64)[:, None]
    gl.store(grad_key + rows * stride_ds + channels[None, :], (grad_k * unit).to(dtype), mask=mask)
    gl.store(grad_value + rows * stride_es + channels[None, :], grad_v.to(dtype), mask=mask)


@gluon.jit(do_not_specialize=(*tiles.SIZES, "group", "reach", "span"))
def in_turn_kernel(
    query,
    key,
    value,
    grad_output,
    duals,
    low_ptr,
    high_ptr,
    grad_key,
    grad_value,
    sums,
    turns,
    factor,
    unit,
    stride_db,
    stride_dh,
    stride_ds,
    stride_eb,
    stride_eh,
    stride_es,
    key_heads,
    group,
    T,
    S,
    reach,
    rows_total,
    span,
    D: gl.constexpr,
    M: gl.constexpr,
    N: gl.constexpr,
    STAGES: gl.constexpr,
    RANGES: gl.constexpr,
    LATE: gl.constexpr,
):
    """Writes grad_key and grad_value [B, G, S, D] of N keys, and adds to `sums` as `delta_kernel` prepares them.

    `query`, `key`, `value` and `grad_output` are descriptors of blocks [1, 1, M or N, padded D], and `duals` one of
    blocks [1, M]. `turns` is the number that the next program draws, and the counters of the tiles of queries. Query t
    sees the keys up to t + `reach`; with RANGES the queries [low, high) of low_ptr and high_ptr [B, S] see a key.
    `span` key heads are computed at a time.
    """
    WIDTH: gl.constexpr = key.block_type.shape[3]
    dtype: gl.constexpr = key.dtype
    k_buf = gl.allocate_shared_memory(dtype, [1, 1, N, WIDTH], key.layout)
    v_buf = gl.allocate_shared_memory(dtype, [1, 1, N, WIDTH], value.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, WIDTH], query.layout)
    g_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, M, WIDTH], grad_output.layout)
    d_bufs = gl.allocate_shared_memory(gl.float32, [3 * STAGES, 1, M], duals.layout)
    s_bufs = gl.allocate_shared_memory(
        dtype, [2 if LATE else 1, N, M], gl.NVMMASharedLayout.get_default_for([N, M], dtype)
    )
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    my_turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    added = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ended = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(my_turn.index(i), count=1)
        mbarrier.init(added.index(i), count=1)
        mbarrier.init(ended.index(i), count=1)

    blocks = gl.cdiv(S, N)
    number = gl.atomic_add(turns, 1, sem="relaxed", scope="gpu")
    spans = number // (span * blocks)
    within = number % (span * blocks)
    at_a_time = gl.minimum(span, gl.num_programs(0) // blocks - spans * span)
    block = within // at_a_time
    row = spans * span + within % at_a_time
    batch, key_head = row // key_heads, row % key_heads
    start_n = block * N
    low_ptr += batch * S
    high_ptr += batch * S
    keys = start_n + gl.arange(0, N, layout=gl.BlockedLayout([1], [32], [N // 16], [0]))
    low, high = _queries_of(keys, low_ptr, high_ptr, T, S, reach, RANGES)
    first = gl.min(low, 0) // M
    count = gl.maximum(gl.cdiv(gl.max(high, 0), M) - first, 0)
    tiles_of_row = gl.cdiv(T, M)
    heads = key_heads * group
    tile_row = (batch * heads + key_head * group) * tiles_of_row
    turns += 1 + tile_row
    sums += tile_row.to(gl.int64) * (M * WIDTH)
    grad_key += batch.to(gl.int64) * stride_db + key_head.to(gl.int64) * stride_dh
    grad_value += batch.to(gl.int64) * stride_eb + key_head.to(gl.int64) * stride_eh
    barrier()
    gl.warp_specialize([
        (_sum, (
            k_buf, v_buf, q_bufs, g_bufs, d_bufs, s_bufs, kv_full, full, my_turn, added, sums, low_ptr, high_ptr,
            grad_key, grad_value, stride_ds, stride_es, start_n, first, count, tiles_of_row, group, factor, unit,
            T, S, reach, D, RANGES, LATE,
        )),
        (_load_tiles, (
            key, value, query, grad_output, duals, k_buf, v_buf, q_bufs, g_bufs, d_bufs, kv_full, full, added,
            batch, key_head, heads, group, start_n, first, count, rows_total, M,
        )),
        (_await_turns, (turns, my_turn, ended, block, tiles_of_row, group, first, count)),
        (_end_turns, (turns, added, ended, tiles_of_row, group, first, count)),
    ], [1, 1, 1], [24, 24, 24])  # fmt: skip
