"""Attention by all T × S scores, in plain PyTorch: for the published operator, and for transforms.

Shapes: B batch, H heads, T queries, S keys, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_inputs import AttentionInputs, budget_of_each
from .documents import visible_ranges
from .precision import arithmetic_dtype, in_own_precision
from .row_operator import differentiable_rows
from .solve_spec import SolveSpec


@in_own_precision
def differentiable_attention(inputs: AttentionInputs, spec: SolveSpec) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, D] in the dtype of `value`, and the threshold a [B, H, T] without gradient.

    It serves any transform of torch.func and any number of derivatives.
    """
    scores, budget = dense_scores(inputs), budget_of_each(inputs.budget, inputs.query)
    weights, threshold = differentiable_rows(scores.flatten(0, 2), budget.flatten(), spec)
    return weighted_values(weights.view(scores.shape), inputs.value), threshold.view(budget.shape)


def for_each_query(x: Tensor, heads: int) -> Tensor:
    """`x` [B, G, S, D] with each of its heads repeated for the query heads that it serves, [B, H, S, D]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def dense_scores(inputs: AttentionInputs) -> Tensor:
    """Scores [B, H, T, S] in the dtype of the arithmetic, −inf where a query does not see the key."""
    query, key, _, _, documents, scale, causal = inputs
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


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """Output [B, H, T, D] in the dtype of `value` [B, G, S, D], for weights [B, H, T, S]."""
    return (weights @ for_each_query(value, weights.shape[1]).to(weights.dtype)).to(value.dtype)
