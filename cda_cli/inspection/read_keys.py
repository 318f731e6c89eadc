"""Which keys each head reads for the last token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.inspection.seen_rows import CAPPED_WEIGHT
from cda_cli.model import Transformer
from cda_cli.model.observe import ObservedAttention, ObservedFeedForward, observing
from cda_cli.runtime import autocast


class ReadKey(NamedTuple):
    """A key with its weight. `place` is the place of its token in the text, or None if it is a null key.

    `is_capped` says that the weight is at the limit of 1, which only rows with a budget have.
    """

    place: int | None
    weight: float
    is_capped: bool


class HeadRead(NamedTuple):
    """The row of one head: its k, the sum of all its weights, and the keys with the largest of them, in their order."""

    layer: int
    head: int
    sparsity_k: float
    row_sum: float
    keys: list[ReadKey]


@torch.no_grad()
def keys_read(model: Transformer, tokens: Sequence[int], dtype: torch.dtype, most: int) -> list[HeadRead]:
    """Returns, layer by layer, the `most` keys that each head reads with the largest weights for the last token.

    `tokens` [T] are at most the context, and `model` is in evaluation mode; `dtype` is that of the matrix products.
    """
    device = next(model.parameters()).device
    rows: dict[int, tuple[Tensor, Tensor, int]] = {}

    def observe(seen: ObservedAttention | ObservedFeedForward) -> None:
        if isinstance(seen, ObservedAttention):  # the last block of rows of a layer comes last
            rows[seen.layer] = (seen.weights[0, :, -1].float().cpu(), seen.sparsity_k[0, :, -1].cpu(), seen.null_keys)

    with observing(model, observe), autocast(device, dtype):
        model(torch.tensor([list(tokens)], device=device))
    has_limit = model.attention_rule.has_budget
    found = []
    for layer, (weights_HS, k_H, null_keys) in sorted(rows.items()):
        largest = weights_HS.topk(min(most, weights_HS.shape[1]))
        for head, (weights, keys) in enumerate(zip(largest.values.tolist(), largest.indices.tolist(), strict=True)):
            read = [
                ReadKey(key - null_keys if key >= null_keys else None, weight, has_limit and weight >= CAPPED_WEIGHT)
                for weight, key in zip(weights, keys, strict=True)
            ]
            found.append(HeadRead(layer, head, k_H[head].item(), weights_HS[head].sum().item(), read))
    return found
