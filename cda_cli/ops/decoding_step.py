"""What a step of decoding does around attention, in which each row has one position, by one kernel each.

Shapes: B rows, V vocabulary, C width of the residual stream, H query heads, K key heads, G heads of a projection, S
slots of a cache, D head width.
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
