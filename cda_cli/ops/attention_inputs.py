"""What attention is computed from, in the order in which the custom operators take it.

Shapes: B batch, H query heads, G key heads (H a multiple of G), T queries, S keys, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .precision import arithmetic_dtype


class AttentionInputs(NamedTuple):
    """query [B, H, T, D]; key, value [B, G, S, D]; budget is the k of all queries, or [B, H, T] in the
    dtype of the arithmetic.

    documents [B, S] are packed texts, or None (see `documents.visible_ranges`). `scale` is the factor on the products
    q·k, and `causal` lets query t see the keys up to t + S − T.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    budget: float | Tensor
    documents: Tensor | None
    scale: float
    causal: bool


def budget_of_each(budget: float | Tensor, query: Tensor) -> Tensor:
    """The k of each query [B, H, T], of a `budget` as `AttentionInputs` has it."""
    if isinstance(budget, Tensor):
        return budget
    return torch.full(query.shape[:3], budget, device=query.device, dtype=arithmetic_dtype(query.dtype))
