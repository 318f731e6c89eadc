"""Attention forward for k ≤ 2 in one pass over the keys, for the matrix units of compute capability 9.0.

With k ≤ 2 at most one entry of a row can be capped: its largest, the *leader*. This is flash attention that also knows
the leader of each row, and whose shift is the largest score of all others. The leader is in the sums, and is taken out
of them at the end. That would lose the rest of the row to rounding where the rest weighs less than 2⁻¹⁰, so such a
leader is *kept out* of the sums and put in at the end, by its position. A leader that is kept out and then displaced is
*owed* to the sums. One owed leader is enough, for an older one weighs less than 2⁻¹⁰ of it.

No step asks whether some row needs one of these, for the answer would have to pass between warps. Every row takes all
steps, so a step has to be cheap for a score. A thread therefore folds the scores that it has of a row and a tile into
*classes* of two and works with their maxima. "All others" are the maxima of the other classes, and the whole class of a
leader is kept out: this changes one number of a class, what its exponents add to the score. The number of the class
stands in the lowest bits of the maxima. So the leader's class is known, and its scores are computed anew at the end.

Two groups of warps compute, each for its own rows, while another warp loads tiles of keys and values for both. While
one group is at its softmax, the other one's products have the matrix units. Gluon (triton.experimental.gluon) lets a
kernel say so. It has no interpreter, so the kernels of attention_leader.py say what this one computes.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from . import tiles
from .gluon_tiles import barrier, bounds, buffers, load_tiles, place_of_program, tiles_of_block, where_seen

HIDDEN = gl.constexpr(tiles.HIDDEN.value)
BEYOND = gl.constexpr(tiles.BEYOND.value)
# Below every score that is not hidden. The shift is never lower, so a hidden score weighs nothing.
FLOOR = gl.constexpr(-1e18)
# log2 of the weight, relative to the leader's, below which the rest would drown in it.
BITS = gl.constexpr(10.0)
# The part of the sums below which what was kept out of them does not count.
NOTHING = gl.constexpr(2.0**-14)
NO_KEY = gl.constexpr(1 << 30)
# Scores of a class. With four a tile takes a sixth fewer instructions, but a block more than that at its end.
FOLD = gl.constexpr(2)


@gluon.jit
def _two_largest(high, low, other_high, other_low):
    """Of two pairs of a larger and a smaller score."""
    return gl.maximum(high, other_high), gl.maximum(gl.minimum(high, other_high), gl.maximum(low, other_low))


@gluon.jit
def _weights(
    scores, start, first, last, full_low, full_high, shift, top, arrival, owed, total, code, owed_code, factor,
    unmarked,
    M: gl.constexpr, N: gl.constexpr, L: gl.constexpr, P: gl.constexpr, RANGES: gl.constexpr,
):  # fmt: skip
    """The weights [M, N] of a tile relative to the new shift, and the state of the rows after the tile.

    Of a row: `shift`; `top`, the leader's score; `arrival`, the shift after the tile that had it; `owed`, the score of
    an owed leader. Of a row and a thread, [M, 4]: the `total` of its weights; `code`, which is the start of the
    leader's tile, plus its class, or −1 where the leader is another thread's; `owed_code` likewise.
    """
    R: gl.constexpr = gl.SliceLayout(1, L)
    PR: gl.constexpr = gl.SliceLayout(1, P)
    C: gl.constexpr = N // FOLD // 4  # classes of a row in a thread
    scores = where_seen(scores, HIDDEN, start, first, last, full_low, full_high, L, RANGES)

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
    marked = (classes.to(gl.int32, bitcast=True) & unmarked) | numbers[None, None, :]
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
    # The compiler would pack the answers for all classes into words and unpack them again.
    bases = gl.inline_asm_elementwise(
        "{ .reg .pred over; setp.gt.f32 over, $1, $2; selp.f32 $0, $3, $4, over; }", "=f,f,f,f,f",
        [folded, limit, gl.full(folded.shape, HIDDEN, gl.float32, layout=folded.type.layout), base],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
    bases = gl.expand_dims(bases, 1)
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


@gluon.constexpr_function
def _in_lines(M: int, A: int, WIDTH: int, SIDE: int = 8) -> gl.DistributedLinearLayout:
    """Of [M, A, WIDTH]: the four threads of a row are those of the products, but each has SIDE numbers side by side."""
    channels = [[0, 0, 2**i] for i in range(WIDTH.bit_length() - 1) if not SIDE <= 2**i < 4 * SIDE]
    among = [[0, 2**i, 0] for i in range(A.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[*channels, *among, [8, 0, 0]], warp_bases=[[16, 0, 0], [32, 0, 0]], block_bases=[],
        lane_bases=[[0, 0, SIDE], [0, 0, 2 * SIDE], [1, 0, 0], [2, 0, 0], [4, 0, 0]], shape=[M, A, WIDTH],
    )  # fmt: skip


@gluon.jit
def _log2(x):
    """Within 2⁻²² in place of a unit in the last place, by one instruction in place of 25."""
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _issue_loads():
    """All loads above start before a number that one of them gives is used below.

    The assembler would let each wait for the use of the one before, but it moves no load across a fence.
    """
    gl.inline_asm_elementwise("fence.acq_rel.cta; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _loaded(base, places, stride, D: gl.constexpr, WIDTH: gl.constexpr):
    """Rows `places` [M, A] of a matrix: [M, A, WIDTH / 2] pairs of channels, as numbers of 32 bits."""
    E: gl.constexpr = _in_lines(places.shape[0], places.shape[1], WIDTH // 2, 4)
    pairs = gl.arange(0, WIDTH // 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, E)))[None, None, :]
    starts = gl.convert_layout(places, gl.SliceLayout(2, E), assert_trivial=True).to(gl.int64) * (stride // 8)
    pointers = base.to(gl.pointer_type(gl.int32), bitcast=True) + starts[:, :, None] * 4 + pairs
    return gl.load(pointers, mask=pairs < (D + 1) // 2, other=0) if D < WIDTH else gl.load(pointers)


@gluon.jit
def _channels(both, dtype: gl.constexpr, D: gl.constexpr):
    """[M, A, WIDTH] float32 of pairs [M, A, WIDTH / 2] of `dtype`; so two numbers of bf16 take two instructions."""
    if dtype == gl.bfloat16:
        even, odd = (both << 16).to(gl.float32, bitcast=True), (both & -65536).to(gl.float32, bitcast=True)
    else:
        even = both.to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
        odd = (both >> 16).to(gl.int16).to(dtype, bitcast=True).to(gl.float32)
    M: gl.constexpr = both.shape[0]
    A: gl.constexpr = both.shape[1]
    WIDTH: gl.constexpr = 2 * both.shape[2]
    if D % 2 > 0:
        pairs = gl.arange(0, WIDTH // 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, both.type.layout)))[None, None, :]
        odd = gl.where(pairs < D // 2, odd, 0.0)
    rows = gl.reshape(gl.join(even, odd), [M, A, WIDTH])
    return gl.convert_layout(rows, _in_lines(M, A, WIDTH), assert_trivial=True)


@gluon.jit
def _keys_of_class(code, N: gl.constexpr, K: gl.constexpr):
    """The keys of the class that `code` [M, 4] names, [M, FOLD], all below 0 for none."""
    C: gl.constexpr = N // FOLD // 4
    lanes = gl.arange(0, 4, layout=gl.SliceLayout(0, code.type.layout))
    keys = (code & -N) + ((code & (C - 1)) >> 1) * 8 + lanes[None, :] * 2 + (code & 1)
    first = gl.convert_layout(gl.max(gl.where(code >= 0, keys, -N), 1), gl.SliceLayout(1, K), assert_trivial=True)
    return first[:, None] + gl.arange(0, FOLD, layout=gl.SliceLayout(0, K))[None, :] * (N // FOLD)


@gluon.jit
def _scores(q, k, keys, seen):
    """Scores [M, FOLD] of a class, HIDDEN where not `seen`; where the two largest are, 0 for none; the second."""
    scores = gl.where(seen, gl.sum(k * gl.expand_dims(q, 1), 2), HIDDEN)
    largest = gl.max(scores, 1)
    place = gl.min(gl.where(scores == largest[:, None], keys, NO_KEY), 1)
    others = gl.where(keys == place[:, None], HIDDEN, scores)
    second = gl.max(others, 1)
    next_place = gl.min(gl.where(others == second[:, None], keys, NO_KEY), 1)
    return scores, gl.where(largest > HIDDEN, place, 0), gl.where(second > HIDDEN, next_place, 0), second


@gluon.jit
def _both(x, y, WIDTH: gl.constexpr):
    """[M, 2] of two [M], for rows of a matrix."""
    L: gl.constexpr = gl.SliceLayout(2, _in_lines(x.shape[0], 2, WIDTH))
    return gl.convert_layout(gl.join(x, y), L, assert_trivial=True)


@gluon.jit
def _with_values(sums, values, weights):
    """The sums [M, WIDTH] with `values` [M, A, WIDTH] times `weights` [M, A]."""
    weights = gl.convert_layout(weights, gl.SliceLayout(2, values.type.layout), assert_trivial=True)
    return sums + gl.convert_layout(gl.sum(values * weights[:, :, None], 1), sums.type.layout, assert_trivial=True)


@gluon.jit
def _attend(
    c: gl.constexpr, key_rows, value_rows, budget, first_ptr, last_ptr, output, stats, leaders,
    q_bufs, k_bufs, v_bufs, sums_bufs, q_full, k_full, v_full, k_empty, v_empty,
    stride_ks, stride_vs, stride_ot, row, block, low, count, T, S, rows_total, factor,
    D: gl.constexpr, M: gl.constexpr, N: gl.constexpr, GROUPS: gl.constexpr,
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
    first, last = bounds(first_ptr, last_ptr, rows, T, S, CAUSAL, RANGES, False)
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
    # −C, which the compiler does not know, so that clearing and setting the bits of a class is one instruction.
    unmarked = -(N // FOLD // 4) - (T < 0)

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
        unmarked, M, N, L, P, RANGES,
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
            unmarked, M, N, L, P, RANGES,
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

    # From here on four lanes still share a row, but each has eight channels in sequence.
    E: gl.constexpr = _in_lines(M, FOLD, WIDTH)
    Q: gl.constexpr = gl.SliceLayout(1, E)
    sums_buf = sums_bufs.index(c)
    sums_buf.store(weighted)
    K: gl.constexpr = gl.SliceLayout(2, E)
    RE: gl.constexpr = gl.SliceLayout(1, K)
    first, last = gl.convert_layout(first, RE, assert_trivial=True), gl.convert_layout(last, RE, assert_trivial=True)
    shift = gl.convert_layout(shift, RE, assert_trivial=True)
    top = gl.convert_layout(top, RE, assert_trivial=True)
    arrival = gl.convert_layout(arrival, RE, assert_trivial=True)
    owed = gl.convert_layout(owed, RE, assert_trivial=True)
    total = gl.convert_layout(gl.sum(total, 1), RE, assert_trivial=True)

    # The leader is taken out of the sums, with the weight that its tile gave it.
    seen = last - first
    kept = top > arrival + BITS / factor
    one = gl.exp2(gl.fma(top, gl.full([M], 0.0, gl.float32, layout=RE) + factor, -arrival * factor))
    one = gl.where(kept | (seen <= 0), 0.0, one)
    since = gl.exp2((arrival - shift) * factor)
    total = gl.where(total < one * since, 0.0, total - one * since)
    taken = one.to(dtype).to(gl.float32) * since

    # The scores of its class and, where an owed leader counts, of that one's class.
    back = gl.exp2((owed - shift) * factor) > total * NOTHING
    keys = _keys_of_class(code, N, K)
    sees = (keys >= first[:, None]) & (keys < last[:, None])
    owed_keys = _keys_of_class(owed_code, N, K)
    owed_sees = back[:, None] & (owed_keys >= first[:, None]) & (owed_keys < last[:, None])
    rows = (block * GROUPS + c) * M + gl.arange(0, M, layout=RE)
    inside = rows < T
    position = row.to(gl.int64) * T + rows
    if EACH:
        k_row = gl.load(budget + position, mask=inside, other=1.0)
    else:
        k_row = gl.full([M], 0.0, gl.float32, layout=RE) + budget
    k = _loaded(key_rows, gl.where(sees, keys, 0), stride_ks, D, WIDTH)
    owed_k = _loaded(key_rows, gl.where(owed_sees, owed_keys, 0), stride_ks, D, WIDTH)
    _issue_loads()
    wide_q = q.load(Q).to(gl.float32)
    scores, place, next_place, second = _scores(wide_q, _channels(k, dtype, D), keys, sees)
    owed_scores, owed_place, owed_next, _ = _scores(wide_q, _channels(owed_k, dtype, D), owed_keys, owed_sees)

    # The shift follows the largest of all others, and with a leader that is kept out those of its class are among them.
    new_shift = gl.where(kept, gl.maximum(shift, gl.minimum(second, top)), shift)
    new_shift = gl.where(new_shift > FLOOR, new_shift, gl.where(seen > 0, top, 0.0))  # The row sees its leader only.
    alpha = gl.exp2((shift - new_shift) * factor)
    shift = new_shift
    total *= alpha
    scale = gl.full([M, FOLD], 0.0, gl.float32, layout=K) + factor
    base = gl.full([M, FOLD], 0.0, gl.float32, layout=K) - (shift * factor)[:, None]
    joins = kept[:, None] & (keys != place[:, None])
    others = gl.where(joins, gl.exp2(gl.fma(scores, scale, base)), 0.0)
    owed_others = gl.where(owed_sees, gl.exp2(gl.fma(owed_scores, scale, base)), 0.0)
    total += gl.sum(others, 1) + gl.sum(owed_others, 1)
    owed_weight = gl.max(owed_others, 1)
    owed_others = gl.where(owed_keys == owed_place[:, None], 0.0, owed_others)
    next_weight, owed_next_weight = gl.max(others, 1), gl.max(owed_others, 1)

    # The dual in powers of two relative to the shift: either all entries are free, or the leader is capped.
    k_row = gl.where((k_row > 0) & (k_row <= 2), k_row, float("nan"))
    lead = gl.where(seen > 0, (top - shift) * factor, 0.0)
    rest = _log2(total)
    both = gl.maximum(lead, rest)
    free = _log2(k_row) - both - _log2(gl.exp2(lead - both) + gl.exp2(rest - both))
    capped = (lead + free > 0) & (k_row > 1)
    covered = seen.to(gl.float32) <= k_row
    peak = gl.where(capped, _log2(gl.maximum(k_row - 1, 0.0)) - rest, free)
    lead_weight = gl.where(capped | covered, 1.0, gl.exp2(lead + free))
    lead_weight = gl.where(seen > 0, lead_weight, 0.0)
    mass = gl.where(covered, seen.to(gl.float32), k_row) - lead_weight
    scale = gl.where(total > 0, mass / gl.where(total > 0, total, 1.0), 0.0)
    scale = gl.where(total == total, scale, total)
    capped = capped & (covered == 0)
    gl.store(leaders + position, gl.where(capped, place, -1), mask=inside)
    margin = gl.where(capped, 0.5 * (lead + peak), BEYOND)
    gl.store(stats + position, gl.where(covered, 0.0, shift), mask=inside)
    gl.store(stats + rows_total + position, gl.where(covered, BEYOND, peak), mask=inside)
    gl.store(stats + 2 * rows_total + position, gl.where(covered, -BEYOND, margin), mask=inside)
    mass = gl.where(covered, 0.0, k_row - gl.where(capped, 1.0, 0.0))
    gl.store(stats + 3 * rows_total + position, mass, mask=inside)

    # The values of a leader, of an owed one and of the next of their classes. A row of no weight is one that is read.
    places = _both(place, gl.where(owed_weight > 0, owed_place, place), WIDTH)
    v = _loaded(value_rows, places, stride_vs, D, WIDTH)
    next_place = gl.where(next_weight > 0, next_place, place)
    owed_next = gl.where(owed_next_weight > 0, owed_next, place)
    next_v = _loaded(value_rows, _both(next_place, owed_next, WIDTH), stride_vs, D, WIDTH)
    _issue_loads()
    weighted = sums_buf.load(Q)
    weighted *= gl.convert_layout(alpha * scale, gl.SliceLayout(1, Q), assert_trivial=True)[:, None]
    weights = _both(lead_weight - taken * alpha * scale, owed_weight * scale, WIDTH)
    weighted = _with_values(weighted, _channels(v, dtype, D), weights)
    weights = _both(next_weight * scale, owed_next_weight * scale, WIDTH)
    weighted = _with_values(weighted, _channels(next_v, dtype, D), weights)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, Q), assert_trivial=True)
    channels = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, Q))
    mask = (rows < T)[:, None] & (channels < D)[None, :]
    gl.store(output + rows[:, None].to(gl.int64) * stride_ot + channels[None, :], weighted.to(dtype), mask=mask)


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
    q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty = buffers(query, key, value, GROUPS, STAGES)
    sums_bufs = gl.allocate_shared_memory(gl.float32, [GROUPS, M, WIDTH], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
    block, row, batch, head = place_of_program(T, rows_total, heads, span, GROUPS * M)
    key_head = head // group
    first_ptr += batch * T
    last_ptr += batch * T
    low, count = tiles_of_block(first_ptr, last_ptr, block, T, S, GROUPS * M, N, CAUSAL, RANGES)
    # Strides are multiples of 8, as the bulk copy engine needs them, so rows can be read by 16 bytes.
    key_rows += (batch.to(gl.int64) * (stride_kb // 8) + key_head.to(gl.int64) * (stride_kh // 8)) * 8
    value_rows += (batch.to(gl.int64) * (stride_vb // 8) + key_head.to(gl.int64) * (stride_vh // 8)) * 8
    output += batch.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
    barrier()
    gl.warp_specialize([
        (_attend, (
            gl.constexpr(0), key_rows, value_rows, budget, first_ptr, last_ptr, output, stats, leaders,
            q_bufs, k_bufs, v_bufs, sums_bufs, q_full, k_full, v_full, k_empty, v_empty,
            stride_ks, stride_vs, stride_ot, row, block, low, count, T, S, rows_total, factor,
            D, M, N, GROUPS, CAUSAL, RANGES, EACH,
        )),
        (_attend, (
            gl.constexpr(1), key_rows, value_rows, budget, first_ptr, last_ptr, output, stats, leaders,
            q_bufs, k_bufs, v_bufs, sums_bufs, q_full, k_full, v_full, k_empty, v_empty,
            stride_ks, stride_vs, stride_ot, row, block, low, count, T, S, rows_total, factor,
            D, M, N, GROUPS, CAUSAL, RANGES, EACH,
        )),
        (load_tiles, (
            query, key, value, q_bufs, k_bufs, v_bufs, q_full, k_full, v_full, k_empty, v_empty,
            batch, head, key_head, block, low, count, M, N, GROUPS,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
