"""Decoding: a few queries and the keys of a cache, of which each row of the batch may have another number.

Shapes: B batch, H query heads, G key heads (H a multiple of G), T queries, S keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_inputs import budget_of_each
from .precision import arithmetic_dtype, in_own_precision
from .solve_spec import SolveSpec

MOST_QUERIES = 8


class DecodingInputs(NamedTuple):
    """query [B, H, T, D]; key, value [B, G, S, D]; lengths [B], whole numbers, or None where each row has S keys.

    Query t sees the keys before lengths − T + t + 1. budget is the k of all queries, or [B, H, T] in the dtype of the
    arithmetic; largest_k is an upper bound of it, where one is known.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor | None
    budget: float | Tensor
    largest_k: float | None
    spec: SolveSpec
    scale: float

    def visible(self) -> Tensor:
        """The number of keys that each query sees, int64 [B, T]."""
        T, S = self.query.shape[2], self.key.shape[2]
        device = self.query.device
        lengths = torch.full((len(self.query),), S, device=device) if self.lengths is None else self.lengths.long()
        return (lengths.clamp(0, S).unsqueeze(1) + torch.arange(1 - T, 1, device=device)).clamp(min=0)

    def budgets(self) -> Tensor:
        """The k of each query, [B, H, T]."""
        return budget_of_each(self.budget, self.query)


# Weights [R, S] of scores [R, S], −inf where masked, and budgets [R], in the dtype of the scores.
SolveRows = Callable[[Tensor, Tensor, SolveSpec], Tensor]


@torch.no_grad()
@in_own_precision
def dense_decoding(inputs: DecodingInputs, solve: SolveRows) -> Tensor:
    """Output [B, H, T, D] in the dtype of `value`, by all scores, in plain PyTorch but for `solve`."""
    query, key, value, *_, spec, scale = inputs
    (B, H, T, D), (G, S), dtype = query.shape, key.shape[1:3], arithmetic_dtype(query.dtype)
    # The queries of a group stand below each other, so that no key is repeated.
    members = (scale * query.to(dtype)).reshape(B, G, H // G * T, D)
    scores = (members @ key.to(dtype).transpose(-1, -2)).view(B, H, T, S)
    if inputs.lengths is not None or T > 1:  # A single query of a row without a length sees every key.
        hidden = torch.arange(S, device=query.device) >= inputs.visible()[..., None]
        scores = scores.masked_fill(hidden.unsqueeze(1), -torch.inf)
    weights = solve(scores.view(-1, S), inputs.budgets().reshape(-1), spec)
    return (weights.view(B, G, -1, S) @ value.to(dtype)).to(value.dtype).view(B, H, T, D)
