"""Attention by way of all T × S scores, in plain PyTorch: for the published operator, and for transforms.

Shapes: B batch, H heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cda_cli.ops.colt5 import published_soft_topk
from cda_cli.ops.documents import visible_ranges
from cda_cli.ops.precision import arithmetic_dtype, in_own_precision
from cda_cli.ops.row_operator import differentiable_rows


@in_own_precision
def differentiable_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    documents: Tensor | None,
    eps: float,
    scale: float,
    causal: bool,
    solver: str,
    n_iters: int,
    eps_init: float,
    eps_decay: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, D] in the dtype of `value`, and the threshold a [B, H, T] without gradient.

    For any transform of torch.func and any number of derivatives. query [B, H, T, D]; key, value [B, G, S, D] with H a
    multiple of G; budget [B, H, T] in the arithmetic dtype; documents [B, S] or None.
    """
    scores = _scores(query, key, documents, scale, causal)
    weights, threshold = differentiable_rows(
        scores.flatten(0, 2), budget.flatten(), eps, solver, n_iters, eps_init, eps_decay
    )
    return _output(weights.view(scores.shape), value), threshold.view(budget.shape)


@in_own_precision
def published_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    budget: Tensor,
    documents: Tensor | None,
    eps: float,
    scale: float,
    causal: bool,
    n_iters: int,
    eps_init: float,
    eps_decay: float,
) -> Tensor:
    """The output of `differentiable_attention` under the weights of `published_soft_topk`."""
    scores = _scores(query, key, documents, scale, causal)
    weights = published_soft_topk(
        scores, budget, mask=None, eps=eps, n_iters=n_iters, eps_init=eps_init, eps_decay=eps_decay
    )
    return _output(weights, value)


def for_each_query(x: Tensor, heads: int) -> Tensor:
    """`x` [B, G, S, D] with each of its heads repeated for the query heads that it serves, [B, H, S, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _scores(query: Tensor, key: Tensor, documents: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Scores [B, H, T, S] in the dtype of the arithmetic, −inf where a query does not see the key."""
    T, S, dtype = query.shape[2], key.shape[2], arithmetic_dtype(query.dtype)
    scores = scale * query.to(dtype) @ for_each_query(key, query.shape[1]).to(dtype).transpose(-1, -2)
    places = torch.arange(S, device=query.device)
    if documents is not None:
        ranges = visible_ranges(documents, T, causal)
        hidden = (places < ranges.first.unsqueeze(-1)) | (places >= ranges.last.unsqueeze(-1))
        return scores.masked_fill(hidden.unsqueeze(1), -torch.inf)
    if causal:
        return scores.masked_fill(places > torch.arange(S - T, S, device=query.device).unsqueeze(-1), -torch.inf)
    return scores


def _output(weights: Tensor, value: Tensor) -> Tensor:
    return (weights @ for_each_query(value, weights.shape[1]).to(weights.dtype)).to(value.dtype)
