"""Attention forward for k ≤ 2 in one pass over the keys, for the matrix units of compute capability 9.0.

With k ≤ 2 at most one entry of a row can be capped: its largest, the *leader*. This is flash attention that also knows
the leader of each row. Usually the leader is in the sums under the weight 1, and is taken out of them at the end. That
would lose the rest of the row to rounding where the rest weighs less than 2⁻¹⁰, so such a leader is *kept out* of the
sums, and the shift stays with the rest. A leader that is kept out and then displaced is *owed* to the sums: they get it
at the end, by its position. One owed leader is enough, for an older one weighs less than 2⁻¹⁰ of it.

Most of the work per score would be the search for the leader's position. A thread therefore folds the scores that it
has of a row and a tile into a few classes, and puts the number of the class into the lowest bits of their maxima. The
maximum of these tells the class, and the keys of the class are looked up at the end.

Two groups of warps compute, each for its own rows, while another warp loads tiles of keys and values for both. While
one group is at its softmax, the other one's products have the matrix units. Gluon (triton.experimental.gluon) lets a
kernel say so. It has no interpreter, so the kernels of attention_leader.py say what this one computes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from . import tiles

HIDDEN = gl.constexpr(tiles.HIDDEN.value)
BEYOND = gl.constexpr(tiles.BEYOND.value)
# Below every score that is not hidden. The shift is never lower, so a hidden score weighs nothing.
FLOOR = gl.constexpr(-1e18)
# log2 of the weight, relative to the leader's, below which the rest would drown in it.
BITS = gl.constexpr(10.0)


@gluon.jit
def _bounds(
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
def _load_tiles(
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
def _any(of_rows, M: gl.constexpr):
    """Whether it holds for a row of the group: one exchange between its warps, where a plain maximum takes two."""
    EVERYWHERE: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[1], [2]], lane_bases=[[0]] * 5, warp_bases=[[0]] * 2, block_bases=[], shape=[4]
    )  # fmt: skip
    of_warps = gl.max(gl.reshape(of_rows.to(gl.int32), [4, M // 4]), 1)
    return gl.max(gl.convert_layout(of_warps, EVERYWHERE), 0) > 0


@gluon.jit
def _weights(
    scores, start, first, last, full_low, full_high, shift, limit, kept, owed, owed_place, total, best, code, factor,
    M: gl.constexpr, N: gl.constexpr, FOLD: gl.constexpr, L: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """The weights [M, N] of a tile relative to the new shift, and the state of the rows after the tile.

    Of a row: `shift`; `limit`, the score above which a new leader needs a closer look; `kept`, the position of a leader
    that is kept out, or −1; `owed` and `owed_place`. Of a row and a thread, [M, 4]: the `total` of its weights, its
    `best` score, and `code`, which is the start of the tile that had it, plus the class.
    """
    R: gl.constexpr = gl.SliceLayout(1, L)
    C: gl.constexpr = N // FOLD // 4  # classes of a row in a thread
    columns = gl.arange(0, N, layout=gl.SliceLayout(0, L))
    if (start < full_low) | (start + N > full_high):
        seen = (start + columns[None, :] >= first[:, None]) & (start + columns[None, :] < last[:, None])
        scores = gl.where(seen, scores, HIDDEN)

    # Of eight neighbouring keys a thread has two, at twice the number of its lane modulo 4.
    folded = gl.max(gl.reshape(scores, [M, FOLD, C // 2, 4, 2]), 1)
    folded = gl.reshape(gl.permute(folded, (0, 2, 1, 3)), [M, 4, C])
    classes = gl.arange(0, C, layout=gl.SliceLayout(0, gl.SliceLayout(1, folded.type.layout)))
    marked = (folded.to(gl.int32, bitcast=True) & -C) | classes[None, None, :]
    mine = gl.convert_layout(gl.max(folded, 2), P, assert_trivial=True)
    where = gl.max(marked.to(gl.float32, bitcast=True), 2).to(gl.int32, bitcast=True) & (C - 1)
    where = gl.convert_layout(where, P, assert_trivial=True)
    code = gl.where(mine > best, start + where, code)
    best = gl.maximum(best, mine)
    top = gl.convert_layout(gl.max(mine, 1), R, assert_trivial=True)

    new_shift = gl.maximum(shift, top)
    over = top > limit
    if _any(over, M):
        # Masks are computed anew rather than kept, which would cost registers.
        at = gl.where(over, gl.max(gl.where(scores == top[:, None], columns[None, :], -1), 1), -1)
        second = gl.max(gl.where(columns[None, :] == at[:, None], HIDDEN, scores), 1)
        second = gl.maximum(second, gl.where(kept >= 0, limit, shift))
        displaced = over & (kept >= 0)
        owed = gl.where(displaced, limit, owed)
        owed_place = gl.where(displaced, kept, owed_place)
        alone = over & (top - second > BITS / factor)
        at = gl.where(alone, at, -1)
        scores = gl.where(columns[None, :] == at[:, None], HIDDEN, scores)
        new_shift = gl.where(alone, second, new_shift)
        kept = gl.where(over, gl.where(alone, start + at, -1), kept)
        limit = gl.where(alone, top, limit)
    limit = gl.where(kept >= 0, limit, new_shift + BITS / factor)

    base = -new_shift * factor
    scale = gl.full([M, N], 0.0, gl.float32, layout=L) + factor
    weights = gl.exp2(gl.fma(scores, scale, base[:, None] + gl.full([M, N], 0.0, gl.float32, layout=L)))
    alpha = gl.exp2((shift - new_shift) * factor)
    sums = gl.sum(gl.sum(gl.reshape(weights, [M, N // 8, 4, 2]), 1), 2)
    sums = gl.convert_layout(sums, P, assert_trivial=True)
    total = total * gl.convert_layout(alpha, gl.SliceLayout(1, P), assert_trivial=True)[:, None] + sums
    return weights, alpha, new_shift, limit, kept, owed, owed_place, total, best, code


@gluon.jit
def _gathered(base, places, stride, D: gl.constexpr, WIDTH: gl.constexpr, LO: gl.constexpr):
    """Rows `places` of a matrix, [rows, WIDTH] float32."""
    channels = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LO))
    pointers = base + places[:, None].to(gl.int64) * stride + channels[None, :]
    if WIDTH == D:
        return gl.load(pointers).to(gl.float32)
    else:  # noqa: RET505
        return gl.load(pointers, mask=(channels < D)[None, :], other=0.0).to(gl.float32)


@gluon.jit
def _attend(
    c: gl.constexpr, key_rows, value_rows, budget, first_ptr, last_ptr, output, stats, leaders,
    q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
    stride_ks, stride_vs, stride_ot, row, block, low, count, T, S, rows_total, factor,
    D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, GROUPS: gl.constexpr, FOLD: gl.constexpr,
    CAUSAL: gl.constexpr, RANGES: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """What a group of four warps does: M rows of queries against all tiles, from the last to the first."""
    STAGES: gl.constexpr = k_bufs.type.shape[0]
    WIDTH: gl.constexpr = q_bufs.type.shape[4]
    L: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    LO: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    R: gl.constexpr = gl.SliceLayout(1, L)
    RO: gl.constexpr = gl.SliceLayout(1, LO)
    A: gl.constexpr = gl.DotOperandLayout(0, LO, 2)
    # The four threads that share a row, each with a quarter of its scores.
    P: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0]], lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], warp_bases=[[16, 0], [32, 0]],
        block_bases=[], shape=[M, 4],
    )  # fmt: skip
    dtype: gl.constexpr = q_bufs.dtype
    rows = (block * GROUPS + c) * M + gl.arange(0, M, layout=R)
    first, last = _bounds(first_ptr, last_ptr, rows, T, S, CAUSAL, RANGES, False)
    full_low, full_high = gl.max(first, 0), gl.min(last, 0)
    shift = gl.full([M], FLOOR, gl.float32, layout=R)
    limit = gl.full([M], HIDDEN, gl.float32, layout=R)
    kept = gl.full([M], -1, gl.int32, layout=R)
    owed = gl.full([M], HIDDEN, gl.float32, layout=R)
    owed_place = gl.full([M], 0, gl.int32, layout=R)
    total = gl.full([M, 4], 0.0, gl.float32, layout=P)
    best = gl.full([M, 4], HIDDEN, gl.float32, layout=P)
    code = gl.full([M, 4], 0, gl.int32, layout=P)
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
    w, alpha, shift, limit, kept, owed, owed_place, total, best, code = _weights(
        scores, start, first, last, full_low, full_high, shift, limit, kept, owed, owed_place, total, best, code,
        factor, M, N, FOLD, L, P,
    )  # fmt: skip
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
        scores = warpgroup_mma_wait(1, deps=[token])
        mbarrier.arrive(k_empty.index(stage), count=1)
        w, alpha, shift, limit, kept, owed, owed_place, total, best, code = _weights(
            scores, start, first, last, full_low, full_high, shift, limit, kept, owed, owed_place, total, best, code,
            factor, M, N, FOLD, L, P,
        )  # fmt: skip
        # Here, between the weights and the wait for the product, it keeps the assembler from moving that wait up.
        mbarrier.wait(v_full.index(stage), phase)
        weighted, w = warpgroup_mma_wait(0, deps=[sums, w])
        mbarrier.arrive(v_empty.index(before), count=1)
        weighted = weighted * gl.convert_layout(alpha, RO, assert_trivial=True)[:, None]
        p = gl.convert_layout(w.to(dtype), A)
    stage = (count - 1) % STAGES
    sums = warpgroup_mma(p, v_bufs.index(stage).reshape((N, WIDTH)), weighted, is_async=True)
    weighted = warpgroup_mma_wait(0, deps=[sums])

    # Which key of its class the leader is.
    C: gl.constexpr = N // FOLD // 4
    lanes = gl.arange(0, 4, layout=gl.SliceLayout(0, P))
    place_of = (code & -N) + ((code & (C - 1)) >> 1) * 8 + lanes[None, :] * 2 + (code & 1)
    of_row = gl.convert_layout(shift, gl.SliceLayout(1, P), assert_trivial=True)
    place_of = gl.where(best == of_row[:, None], place_of, 0)
    place = gl.convert_layout(gl.max(place_of, 1), RO, assert_trivial=True)
    first, last = gl.convert_layout(first, RO, assert_trivial=True), gl.convert_layout(last, RO, assert_trivial=True)
    if FOLD > 1:
        candidate = place
        largest = gl.full([M], HIDDEN, gl.float32, layout=RO)
        for _ in gl.static_range(FOLD):
            ours = (candidate >= first) & (candidate < last)
            k = _gathered(key_rows, gl.where(ours, candidate, 0), stride_ks, D, WIDTH, LO)
            score = gl.where(ours, gl.sum(k * q.load(LO).to(gl.float32), 1), HIDDEN)
            place = gl.where(score > largest, candidate, place)
            largest = gl.maximum(largest, score)
            candidate += N // FOLD
    kept = gl.convert_layout(kept, RO, assert_trivial=True)
    is_kept = kept >= 0
    place = gl.minimum(gl.where(is_kept, kept, place), S - 1)
    lead_value = _gathered(value_rows, place, stride_vs, D, WIDTH, LO)

    seen = last - first
    shift = gl.convert_layout(shift, RO, assert_trivial=True)
    limit = gl.convert_layout(limit, RO, assert_trivial=True)
    shift = gl.where(is_kept & (shift <= FLOOR), limit, shift)  # The leader is all that the row sees.
    total = gl.convert_layout(gl.sum(total, 1), RO, assert_trivial=True)
    one = gl.exp2(gl.fma(shift, gl.full([M], 0.0, gl.float32, layout=RO) + factor, -shift * factor))
    one = gl.where(is_kept | (seen <= 0), 0.0, one)
    total = gl.where(total < one, 0.0, total - one)
    weighted -= one.to(dtype).to(gl.float32)[:, None] * lead_value
    owed = gl.convert_layout(owed, RO, assert_trivial=True)
    owed_place = gl.convert_layout(owed_place, RO, assert_trivial=True)
    if gl.max(owed, 0) > 0.5 * HIDDEN:
        returned = gl.where(owed > 0.5 * HIDDEN, gl.exp2((owed - shift) * factor), 0.0)
        total += returned
        weighted += returned[:, None] * _gathered(value_rows, owed_place, stride_vs, D, WIDTH, LO)

    # The dual in powers of two relative to the shift: either all entries are free, or the leader is capped.
    rows = (block * GROUPS + c) * M + gl.arange(0, M, layout=RO)
    inside = rows < T
    position = row.to(gl.int64) * T + rows
    if EACH:
        k_row = gl.load(budget + position, mask=inside, other=1.0)
    else:
        k_row = gl.full([M], 0.0, gl.float32, layout=RO) + budget
    k_row = gl.where((k_row > 0) & (k_row <= 2), k_row, float("nan"))
    lead = gl.where(is_kept, (limit - shift) * factor, 0.0)
    rest = gl.log2(total)
    both = gl.maximum(lead, rest)
    free = gl.log2(k_row) - both - gl.log2(gl.exp2(lead - both) + gl.exp2(rest - both))
    capped = (lead + free > 0) & (k_row > 1)
    covered = seen.to(gl.float32) <= k_row
    peak = gl.where(capped, gl.log2(gl.maximum(k_row - 1, 0.0)) - rest, free)
    lead_weight = gl.where(capped | covered, 1.0, gl.exp2(lead + free))
    lead_weight = gl.where(seen > 0, lead_weight, 0.0)
    mass = gl.where(covered, seen.to(gl.float32), k_row) - lead_weight
    scale = gl.where(total > 0, mass / gl.where(total > 0, total, 1.0), 0.0)
    scale = gl.where(total == total, scale, total)
    weighted = weighted * scale[:, None] + lead_value * lead_weight[:, None]
    capped = capped & (covered == 0)
    gl.store(leaders + position, gl.where(capped, place, -1), mask=inside)
    margin = gl.where(capped, 0.5 * (lead + peak), BEYOND)
    gl.store(stats + position, gl.where(covered, 0.0, shift), mask=inside)
    gl.store(stats + rows_total + position, gl.where(covered, BEYOND, peak), mask=inside)
    gl.store(stats + 2 * rows_total + position, gl.where(covered, -BEYOND, margin), mask=inside)
    mass = gl.where(covered, 0.0, k_row - gl.where(capped, 1.0, 0.0))
    gl.store(stats + 3 * rows_total + position, mass, mask=inside)

    # A thread that stores 16 bytes has a whole line with its neighbours.
    LS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    result = gl.convert_layout(weighted.to(dtype), LS)
    rows = (block * GROUPS + c) * M + gl.arange(0, M, layout=gl.SliceLayout(1, LS))
    channels = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LS))
    mask = (rows < T)[:, None] & (channels < D)[None, :]
    gl.store(output + rows[:, None].to(gl.int64) * stride_ot + channels[None, :], result, mask=mask)


@gluon.jit(do_not_specialize=(*tiles.SIZES, "group", "span"))
def one_pass_kernel(
    query,
    key,
    value,
    key_rows,
    value_rows,
    budget,
    first_ptr,
    last_ptr,
    output,
    stats,
    leaders,
    factor,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_vb,
    stride_vh,
    stride_vs,
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
    FOLD: gl.constexpr,
    CAUSAL: gl.constexpr,
    RANGES: gl.constexpr,
    EACH: gl.constexpr,
):
    """Writes output [B, H, T, D], stats [4, B, H, T] and leaders [B, H, T] as `leader_output_kernel` does.

    `query`, `key` and `value` are descriptors of blocks [1, 1, M or N, padded D]; single rows are read from `key_rows`
    and `value_rows`. `span` query heads are computed at a time, so that their keys and values stay in the cache of the
    GPU. Of those, the last queries go first, because they see the most keys of a causal sequence.
    """
    GROUPS: gl.constexpr = 2
    WIDTH: gl.constexpr = key.block_type.shape[3]
    dtype: gl.constexpr = key.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, M, WIDTH], query.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, WIDTH], key.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, N, WIDTH], value.layout)
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

    blocks = gl.cdiv(T, GROUPS * M)
    program = gl.program_id(0)
    spans = program // (span * blocks)
    within = program % (span * blocks)
    at_a_time = gl.minimum(span, rows_total // T - spans * span)
    block = blocks - 1 - within // at_a_time
    row = spans * span + within % at_a_time
    batch, head = row // heads, row % heads
    key_head = head // group
    rows = block * (GROUPS * M) + gl.arange(0, GROUPS * M, layout=gl.BlockedLayout([1], [32], [4], [0]))
    first_ptr += batch * T
    last_ptr += batch * T
    first, last = _bounds(first_ptr, last_ptr, rows, T, S, CAUSAL, RANGES, True)
    low = gl.min(first, 0) // N * N
    count = gl.maximum(gl.cdiv(gl.max(last, 0) - low, N), 1)
    key_rows += batch.to(gl.int64) * stride_kb + key_head.to(gl.int64) * stride_kh
    value_rows += batch.to(gl.int64) * stride_vb + key_head.to(gl.int64) * stride_vh
    output += batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    gl.warp_specialize([
        (_attend, (
            gl.constexpr(0), key_rows, value_rows, budget, first_ptr, last_ptr, output, stats, leaders,
            q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
            stride_ks, stride_vs, stride_ot, row, block, low, count, T, S, rows_total, factor,
            D, M, N, GROUPS, FOLD, CAUSAL, RANGES, EACH,
        )),
        (_attend, (
            gl.constexpr(1), key_rows, value_rows, budget, first_ptr, last_ptr, output, stats, leaders,
            q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
            stride_ks, stride_vs, stride_ot, row, block, low, count, T, S, rows_total, factor,
            D, M, N, GROUPS, FOLD, CAUSAL, RANGES, EACH,
        )),
        (_load_tiles, (
            query, key, value, q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
            batch, head, key_head, block, low, count, M, N, GROUPS,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
