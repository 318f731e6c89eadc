"""Rows of unequal length in one batch: each row has padding in front, so that all rows end at the same position.

The first position of a row is that of its first token, and no token sees the padding. A row thus has the logits that it
has alone. What stands at the padding itself has no meaning.

Shapes: B batch, T positions, S keys, H heads, D head width. `padding_B` is the number of tokens of padding, int64 [B].
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from cda_cli.model.context_parallel import ContextPart

# How many tokens stand before those of a pass: as many in each row, or int64 [B]. Or the part of each sequence that
# this process has.
Start: TypeAlias = int | Tensor | ContextPart


def row_positions(start: Start, T: int, padding_B: Tensor | None) -> slice | Tensor:
    """Returns the positions of T tokens after `start` others: a slice or [T] for all rows, or [B, T]; 0 in the padding.

    `start` may be int64 [B], or the part of a sequence that has these tokens; such rows have no padding.
    """
    if isinstance(start, ContextPart):
        return start.positions(T)
    if isinstance(start, Tensor):
        return start.unsqueeze(1) + torch.arange(T, device=start.device) if T > 1 else start.unsqueeze(1)
    if padding_B is None:
        return slice(start, start + T)
    return (torch.arange(start, start + T, device=padding_B.device) - padding_B.unsqueeze(1)).clamp(min=0)


def padding_first(heads_BHSD: Tensor, null_keys: int, padding_B: Tensor) -> Tensor:
    """Moves the null keys, which come first in heads [B, H, S, D], behind the padding of each row.

    The keys that a query sees are then neighbours, as the operator has them in a document.
    """
    S = heads_BHSD.shape[2]
    # A cache that holds nothing but padding so far has less of it than the whole row.
    place, padding = torch.arange(S, device=padding_B.device), padding_B.clamp(max=S - null_keys).unsqueeze(1)
    is_padding, is_null = place < padding, (place >= padding) & (place < padding + null_keys)
    source_BS = place + null_keys * is_padding.long() - padding * is_null.long()
    return heads_BHSD.gather(2, source_BS[:, None, :, None].expand_as(heads_BHSD))


def padding_or_text(padding_B: Tensor, S: int) -> Tensor:
    """Returns the documents of S keys, int64 [B, S]: 0 for padding, 1 for null keys and tokens."""
    return (torch.arange(S, device=padding_B.device) >= padding_B.unsqueeze(1)).long()
