"""Norm and rotation of queries and keys, which a model does around attention, by one kernel each way."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Heads(NamedTuple):
    """query [B, T, H, D], key and value [B, T, K, D], and what else was projected, [B, T, G − H − 2K, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    rest: Tensor


def norm_and_rotate(
    projected: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    key_heads: int,
    eps: float,
) -> Heads:
    """Queries and keys of `projected` [B, T, G, D] with RMSNorm and rotary positions, from position 0 on.

    `projected` has the H = `heads` queries first, then the K = `key_heads` keys, and as many values. The norm adds
    `eps` to the mean square; its gains are [D]. The tables `cos` and `sin` are [at least T, D], float32, in which
    channels i and i + D/2 make a pair, `sin` carries the sign, and both may hold a factor; D is even. The arithmetic is
    float32, and the result, rounded once, has the dtype of `projected`. See `can_run_kernels`.
    """
    from .triton.heads_launches import norm_and_rotate as launch

    return launch(projected, query_gain, key_gain, cos, sin, heads, key_heads, eps)
