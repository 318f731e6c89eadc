"""What attention is computed from, in the order in which the custom operators take it.

Shapes: B batch, H query heads, G key heads (H a multiple of G), T queries, S keys, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionInputs(NamedTuple):
    """query [B, H, T, D]; key, value [B, G, S, D]; budget [B, H, T] in the dtype of the arithmetic.

    documents [B, S] are packed texts, or None (see `documents.visible_ranges`). `scale` is the factor on the products
    q·k, and `causal` lets query t see the keys up to t + S − T.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    budget: Tensor
    documents: Tensor | None
    scale: float
    causal: bool
