"""Attention forward for k ≤ 2 in one pass over the keys, for the matrix units of compute capability 9.0.

With k ≤ 2 at most one entry of a row can be capped: its largest, the *leader*. This is flash attention that also knows
the leader of each row, and whose shift is the largest score of all others. The leader is in the sums, and is taken out
of them at the end. That would lose the rest of the row to rounding where the rest weighs less than 2⁻¹⁰, so such a
leader is *kept out* of the sums and put in at the end, by its position. A leader that is kept out and then displaced is
*owed* to the sums. One owed leader is enough, for an older one weighs less than 2⁻¹⁰ of it.

No step asks whether some row needs one of these, for the answer would have to pass between warps. Every row takes all
steps, so a step has to be cheap for a score. A thread therefore folds the scores that it has of a row and a tile into a
few *classes* and works with their maxima. "All others" are the maxima of the other classes, and the whole class of a
leader is kept out: this changes one number of a class, what its exponents add to the score. The number of the class
stands in the lowest bits of the maxima. So the leader's class is known, and its scores are computed anew at the end.

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
# The part of the sums below which what was kept out of them does not count.
NOTHING = gl.constexpr(2.0**-14)


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
def _two_largest(high, low, other_high, other_low):
    """Of two pairs of a larger and a smaller score."""
    return gl.maximum(high, other_high), gl.maximum(gl.minimum(high, other_high), gl.maximum(low, other_low))


@gluon.jit
def _weights(
    scores, start, first, last, full_low, full_high, shift, top, arrival, owed, total, code, owed_code, factor,
    M: gl.constexpr, N: gl.constexpr, FOLD: gl.constexpr, L: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """The weights [M, N] of a tile relative to the new shift, and the state of the rows after the tile.

    Of a row: `shift`; `top`, the leader's score; `arrival`, the shift after the tile that had it; `owed`, the score of
    an owed leader. Of a row and a thread, [M, 4]: the `total` of its weights; `code`, which is the start of the
    leader's tile, plus its class, or −1 where the leader is another thread's; `owed_code` likewise.
    """
    R: gl.constexpr = gl.SliceLayout(1, L)
    PR: gl.constexpr = gl.SliceLayout(1, P)
    C: gl.constexpr = N // FOLD // 4  # classes of a row in a thread
    columns = gl.arange(0, N, layout=gl.SliceLayout(0, L))
    if (start < full_low) | (start + N > full_high):
        seen = (start + columns[None, :] >= first[:, None]) & (start + columns[None, :] < last[:, None])
        scores = gl.where(seen, scores, HIDDEN)

    # Of eight neighbouring keys a thread has two, at twice the number of its lane modulo 4.
    folded = gl.max(gl.reshape(scores, [M, FOLD, C // 2, 4, 2]), 1)
    pairs = gl.permute(folded, (0, 2, 1, 3))
    high, low = gl.reduce((gl.max(pairs, 3), gl.min(pairs, 3)), 2, _two_largest)
    mine = gl.convert_layout(high, P, assert_trivial=True)
    tile_top, second = gl.reduce((mine, gl.convert_layout(low, P, assert_trivial=True)), 1, _two_largest)
    tile_top = gl.convert_layout(tile_top, R, assert_trivial=True)
    second = gl.convert_layout(second, R, assert_trivial=True)
    classes = gl.reshape(pairs, [M, 4, C])
    numbers = gl.arange(0, C, layout=gl.SliceLayout(0, gl.SliceLayout(1, classes.type.layout)))
    marked = (classes.to(gl.int32, bitcast=True) & -C) | numbers[None, None, :]
    where = gl.max(marked.to(gl.float32, bitcast=True), 2).to(gl.int32, bitcast=True) & (C - 1)
    where = gl.convert_layout(where, P, assert_trivial=True)

    new_shift = gl.maximum(shift, gl.maximum(second, gl.minimum(top, tile_top)))
    new = tile_top > top
    displaced = new & (top > arrival + BITS / factor)
    owed = gl.where(displaced, top, owed)
    owed_code = gl.where(gl.convert_layout(displaced, PR, assert_trivial=True)[:, None], code, owed_code)
    found = gl.where(mine == gl.convert_layout(tile_top, PR, assert_trivial=True)[:, None], start + where, -1)
    code = gl.where(gl.convert_layout(new, PR, assert_trivial=True)[:, None], found, code)
    arrival = gl.where(new, new_shift, arrival)
    top = gl.maximum(top, tile_top)

    FR: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, folded.type.layout)))
    base = gl.convert_layout(-new_shift * factor, FR, assert_trivial=True)[:, None, None, None]
    limit = gl.convert_layout(new_shift + BITS / factor, FR, assert_trivial=True)[:, None, None, None]
    bases = gl.expand_dims(gl.where(folded > limit, HIDDEN, base), 1)
    wide = gl.reshape(scores, [M, FOLD, C // 2, 4, 2])
    bases, wide = gl.broadcast(bases, wide)
    scale = gl.full(wide.shape, 0.0, gl.float32, layout=wide.type.layout) + factor
    weights = gl.exp2(gl.fma(wide, scale, bases))
    weights = gl.convert_layout(gl.reshape(weights, [M, N]), L, assert_trivial=True)
    alpha = gl.exp2((shift - new_shift) * factor)
    sums = gl.sum(gl.sum(gl.reshape(weights, [M, N // 8, 4, 2]), 1), 2)
    sums = gl.convert_layout(sums, P, assert_trivial=True)
    total = total * gl.convert_layout(alpha, PR, assert_trivial=True)[:, None] + sums
    return weights, alpha, new_shift, top, arrival, owed, total, code, owed_code


@gluon.jit
def _gathered(base, places, stride, D: gl.constexpr, WIDTH: gl.constexpr, LO: gl.constexpr):
    """Rows `places` of a matrix, [rows, WIDTH] float32.

    Addresses are of eight channels and then of multiples of eight, which are the same for all threads. So these become
    offsets in the instructions.
    """
    M: gl.constexpr = places.shape[0]
    like = gl.reshape(gl.full([M, WIDTH], 0, gl.int32, layout=LO), [M, WIDTH // 8, 8])
    E: gl.constexpr = like.type.layout
    eights = gl.arange(0, WIDTH // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, E)))[None, :, None] * 8
    within = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, E)))[None, None, :]
    starts = gl.convert_layout(places, gl.SliceLayout(1, gl.SliceLayout(2, E)), assert_trivial=True)
    pointers = base + starts.to(gl.int64)[:, None, None] * stride + within + eights
    rows = gl.load(pointers, mask=within + eights < D, other=0.0)
    return gl.convert_layout(gl.reshape(rows, [M, WIDTH]), LO, assert_trivial=True).to(gl.float32)


@gluon.jit
def _first_keys(code, N: gl.constexpr, FOLD: gl.constexpr, LO: gl.constexpr):
    """The first key of the class that `code` [M, 4] names, −N for none, so that none of its keys is one: [M]."""
    C: gl.constexpr = N // FOLD // 4
    lanes = gl.arange(0, 4, layout=gl.SliceLayout(0, code.type.layout))
    keys = (code & -N) + ((code & (C - 1)) >> 1) * 8 + lanes[None, :] * 2 + (code & 1)
    return gl.convert_layout(gl.max(gl.where(code >= 0, keys, -N), 1), gl.SliceLayout(1, LO), assert_trivial=True)


@gluon.jit
def _in_class(
    q, key_rows, place, first, last, stride, D: gl.constexpr, N: gl.constexpr, FOLD: gl.constexpr, LO: gl.constexpr
):  # fmt: skip
    """Of the class whose first key is `place`: where its largest score is, and the second largest, HIDDEN for none.

    A key that a query does not see is none of the class.
    """
    at = gl.full(place.shape, 0, gl.int32, layout=gl.SliceLayout(1, LO))
    largest = gl.full(place.shape, HIDDEN, gl.float32, layout=gl.SliceLayout(1, LO))
    second = largest
    for _ in range(FOLD):
        seen = (place >= first) & (place < last)
        k = _gathered(key_rows, gl.where(seen, place, 0), stride, D, q.shape[1], LO)
        score = gl.where(seen, gl.sum(k * q.load(LO).to(gl.float32), 1), HIDDEN)
        second = gl.maximum(second, gl.minimum(score, largest))
        at = gl.where(score > largest, place, at)
        largest = gl.maximum(largest, score)
        place += N // FOLD
    return at, second


@gluon.jit
def _with_others(
    weighted, total, rows, place, without, shift, factor, q, key_rows, value_rows, first, last, stride_ks, stride_vs,
    D: gl.constexpr, N: gl.constexpr, FOLD: gl.constexpr, LO: gl.constexpr,
):  # fmt: skip
    """The sums with the class whose first key is `place`, but for the key `without`, where `rows` holds."""
    WIDTH: gl.constexpr = q.shape[1]
    for _ in range(FOLD):
        joins = rows & (place >= first) & (place < last) & (place != without)
        at = gl.where(joins, place, 0)
        score = gl.sum(_gathered(key_rows, at, stride_ks, D, WIDTH, LO) * q.load(LO).to(gl.float32), 1)
        weight = gl.where(joins, gl.exp2((score - shift) * factor), 0.0)
        total += weight
        weighted += weight[:, None] * _gathered(value_rows, at, stride_vs, D, WIDTH, LO)
        place += N // FOLD
    return weighted, total


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
    top = gl.full([M], HIDDEN, gl.float32, layout=R)
    arrival = gl.full([M], FLOOR, gl.float32, layout=R)
    owed = gl.full([M], HIDDEN, gl.float32, layout=R)
    total = gl.full([M, 4], 0.0, gl.float32, layout=P)
    code = gl.full([M, 4], -1, gl.int32, layout=P)
    owed_code = gl.full([M, 4], -1, gl.int32, layout=P)
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
    w, alpha, shift, top, arrival, owed, total, code, owed_code = _weights(
        scores, start, first, last, full_low, full_high, shift, top, arrival, owed, total, code, owed_code, factor,
        M, N, FOLD, L, P,
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
        w, alpha, shift, top, arrival, owed, total, code, owed_code = _weights(
            scores, start, first, last, full_low, full_high, shift, top, arrival, owed, total, code, owed_code, factor,
            M, N, FOLD, L, P,
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

    first, last = gl.convert_layout(first, RO, assert_trivial=True), gl.convert_layout(last, RO, assert_trivial=True)
    class_place = _first_keys(code, N, FOLD, LO)
    place, second = _in_class(q, key_rows, class_place, first, last, stride_ks, D, N, FOLD, LO)
    lead_value = _gathered(value_rows, place, stride_vs, D, WIDTH, LO)

    # The leader is taken out of the sums, with the weight that its tile gave it.
    seen = last - first
    shift = gl.convert_layout(shift, RO, assert_trivial=True)
    top = gl.convert_layout(top, RO, assert_trivial=True)
    arrival = gl.convert_layout(arrival, RO, assert_trivial=True)
    owed = gl.convert_layout(owed, RO, assert_trivial=True)
    total = gl.convert_layout(gl.sum(total, 1), RO, assert_trivial=True)
    kept = top > arrival + BITS / factor
    one = gl.exp2(gl.fma(top, gl.full([M], 0.0, gl.float32, layout=RO) + factor, -arrival * factor))
    one = gl.where(kept | (seen <= 0), 0.0, one)
    since = gl.exp2((arrival - shift) * factor)
    total = gl.where(total < one * since, 0.0, total - one * since)
    weighted -= (one.to(dtype).to(gl.float32) * since)[:, None] * lead_value

    # The shift follows the largest of all others, and with a leader that is kept out those of its class are among them.
    new_shift = gl.where(kept, gl.maximum(shift, gl.minimum(second, top)), shift)
    new_shift = gl.where(new_shift > FLOOR, new_shift, gl.where(seen > 0, top, 0.0))  # The row sees its leader only.
    alpha = gl.exp2((shift - new_shift) * factor)
    shift = new_shift
    total *= alpha
    weighted *= alpha[:, None]
    with_others = kept & (gl.exp2((second - shift) * factor) > total * NOTHING)
    if gl.max(with_others.to(gl.int32), 0) > 0:
        weighted, total = _with_others(
            weighted, total, with_others, class_place, place, shift, factor, q, key_rows, value_rows, first, last,
            stride_ks, stride_vs, D, N, FOLD, LO,
        )  # fmt: skip
    returned = gl.exp2((owed - shift) * factor)
    returned = gl.where(returned > total * NOTHING, returned, 0.0)
    if gl.max(returned, 0) > 0:
        owed_class = gl.where(returned > 0, _first_keys(owed_code, N, FOLD, LO), -N)
        owed_place, second = _in_class(q, key_rows, owed_class, first, last, stride_ks, D, N, FOLD, LO)
        total += returned
        weighted += returned[:, None] * _gathered(value_rows, owed_place, stride_vs, D, WIDTH, LO)
        with_others = gl.exp2((second - shift) * factor) > total * NOTHING
        if gl.max(with_others.to(gl.int32), 0) > 0:
            weighted, total = _with_others(
                weighted, total, with_others, owed_class, owed_place, shift, factor, q, key_rows, value_rows, first,
                last, stride_ks, stride_vs, D, N, FOLD, LO,
            )  # fmt: skip

    # The dual in powers of two relative to the shift: either all entries are free, or the leader is capped.
    rows = (block * GROUPS + c) * M + gl.arange(0, M, layout=RO)
    inside = rows < T
    position = row.to(gl.int64) * T + rows
    if EACH:
        k_row = gl.load(budget + position, mask=inside, other=1.0)
    else:
        k_row = gl.full([M], 0.0, gl.float32, layout=RO) + budget
    k_row = gl.where((k_row > 0) & (k_row <= 2), k_row, float("nan"))
    lead = gl.where(seen > 0, (top - shift) * factor, 0.0)
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
