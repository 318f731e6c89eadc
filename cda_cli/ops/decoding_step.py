"""What a step of decoding does around attention, in which each row has one position, by one kernel each.

Shapes: B rows, V vocabulary, C width of the residual stream, H query heads, K key heads, G heads of a projection, S
slots of a cache, D head width, F units of the feed-forward, N blocks of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WIDEST_STREAM = 16384  # A program has a row in its registers.


class HeadBudgets(NamedTuple):
    """k = 1 + (most − 1)·σ(logit + bias), with bias [H]; the logits are the H numbers behind the values."""

    bias: Tensor
    most: float


class StepHeads(NamedTuple):
    """query [B, H, D], and the k of each head, [B, H] float32, if it was asked for."""

    query: Tensor
    budget: Tensor | None


def add_and_norm(
    x: Tensor, branch: Tensor | None, gain: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns x + branch [..., C], and its norm in `dtype`: LayerNorm if it is `centred`, RMSNorm if not.

    C is at most WIDEST_STREAM. `gain` and `bias` are [C]; `eps` is added to the variance, or to the mean square. The
    arithmetic is float32. There is no gradient. See `can_run_kernels`.
    """
    from .triton.step_launches import add_and_norm as launch

    return launch(x, branch, gain, bias, eps, centred, dtype)


def heads_of_step(
    projected: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    heads: int,
    *,
    null_keys: int,
    gains: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    tables: tuple[Tensor, Tensor] | None = None,
    query_scale: Tensor | None = None,
    budgets: HeadBudgets | None = None,
) -> StepHeads:
    """Stores the new key and value of each row in a cache, and returns its queries.

    `projected` [B, G, D] has the H = `heads` queries first, then K keys and K values. keys and values [at least B, K,
    S, D] have the null keys first, and position `lengths` [B] (int64) of a row is the new one. With `gains` [D] each,
    queries and keys get an RMSNorm, whose `eps` is added to the mean square; with `tables` (see `norm_and_rotate`)
    they are rotated to their position; and queries are multiplied by the number `query_scale`. The arithmetic is
    float32. There is no gradient. See `can_run_kernels`.
    """
    from .triton.step_launches import heads_of_step as launch

    return launch(
        projected,
        keys,
        values,
        lengths,
        heads,
        null_keys=null_keys,
        gains=gains,
        eps=eps,
        tables=tables,
        query_scale=query_scale,
        budgets=budgets,
    )


def draw_token(logits: Tensor, temperature: Tensor, greedy: Tensor, uniform: Tensor, count: Tensor) -> Tensor:
    """Returns the token of each row of `logits` [B, V], int64 [B]: the likeliest where `greedy` [B], else a drawn one.

    Its share of the softmax of logits/temperature, in the order of the tokens, holds the row's number of `uniform` [B,
    n] at `count` mod n. `temperature` [B] and `uniform`, numbers of [0, 1), are float64, as the arithmetic; `count` [B]
    is int64. See `can_run_kernels`.
    """
    from .triton.step_launches import draw_token as launch

    return launch(logits, temperature, greedy, uniform, count)


def routed_blocks(
    x: Tensor,
    factors: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    tolerance: float,
    dtype: torch.dtype,
    read: Tensor | None = None,
) -> Tensor:
    """Returns Σ λ_b · down_b · relu²(up_b · x) over the N blocks b of F/N neighbouring units, [B, C] in `dtype`.

    The rows are few. x is [B, C], the `factors` λ are [B, N], `up` is [F, C] and `down` [C, F], the biases are [F] and
    [C]; they may have any dtype of the kernels. Where the λ of a row is at most `tolerance`, rounded to its dtype, the
    row does not read the weights of the block. `read`, int64 [2], grows by the number of blocks that any row reads, and
    by N. The arithmetic is float32, and a row is as it is alone, bit for bit. There is no gradient. See
    `can_run_kernels`.
    """
    from .triton.step_launches import routed_blocks as launch

    return launch(x, factors, up, up_bias, down, down_bias, tolerance=tolerance, dtype=dtype, read=read)
