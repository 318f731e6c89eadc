"""The scores of a few queries against many keys. A program takes a block of keys and a block of their queries."""

from __future__ import annotations

import triton
import triton.language as tl

from .decoding_pieces import visible_keys
from .tiles import SIZES, load_tile, product, sees, visible_range


@triton.jit(do_not_specialize=SIZES)
def few_scores_kernel(
    query,
    key,
    first_ptr,
    last_ptr,
    lengths,
    scores,
    scale,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_ks,
    key_heads,
    group,
    T,
    S,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr,
    RANGES: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    """Writes scores [B, H, T, S] float32 = scale·q·k, −inf where the query does not see the key.

    With LENGTHS, lengths [B] says how many keys a row of the batch has, of S.
    """
    pair = tl.program_id(1)
    batch, head = pair // key_heads, pair % key_heads
    member = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)  # among the group·T queries, heads first
    query_head, rows = head * group + member // T, member % T
    exists = member < group * T
    keys = visible_keys(lengths, batch, S, LENGTHS)
    first, last = visible_range(rows, T, keys, first_ptr + batch * T, last_ptr + batch * T, CAUSAL, RANGES)
    channels = tl.arange(0, BLOCK_D)
    place_q = batch.to(tl.int64) * stride_qb + query_head.to(tl.int64) * stride_qh + rows * stride_qt
    inside = exists[:, None] & (channels < D)[None, :]
    q = tl.load(query + place_q[:, None] + channels[None, :], mask=inside, other=0.0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    base_k = key + batch.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    k = load_tile(base_k, columns, stride_ks, S, D, BLOCK_D, True)
    visible = sees(first, last, columns)
    values = tl.where(visible, product(q, tl.trans(k)) * scale, float("-inf"))
    place = ((batch.to(tl.int64) * (key_heads * group) + query_head) * T + rows) * S
    tl.store(scores + place[:, None] + columns[None, :], values, mask=exists[:, None] & (columns < S)[None, :])
