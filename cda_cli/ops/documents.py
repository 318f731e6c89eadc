"""Packed documents: which keys a query sees where one sequence holds several texts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class VisibleRanges(NamedTuple):
    """int32 tensors. Query t sees the keys [first, last) [B, T]; the queries [low, high) [B, S] see key s."""

    first: Tensor
    last: Tensor
    low: Tensor
    high: Tensor


def visible_ranges(documents: Tensor, queries: int, causal: bool) -> VisibleRanges:
    """The ranges for `documents` [B, S]: a run of equal numbers is a document; the T queries stand at its end."""
    B, S = documents.shape
    place = torch.arange(S, device=documents.device).expand(B, S)
    changes = documents[:, 1:] != documents[:, :-1]
    begins = torch.cat((torch.ones_like(changes[:, :1]) if S > 1 else place[:, :1] == 0, changes), 1)
    start = torch.where(begins, place, 0).cummax(1).values
    ends = torch.cat((changes, torch.ones_like(begins[:, :1])), 1)
    stop = torch.where(ends, place + 1, S).flip(1).cummin(1).values.flip(1)
    ahead = S - queries
    first, last = start[:, ahead:], (place + 1 if causal else stop)[:, ahead:]
    low = ((place if causal else start) - ahead).clamp(min=0)
    high = (stop - ahead).clamp(min=0)
    return VisibleRanges(*(tensor.to(torch.int32).contiguous() for tensor in (first, last, low, high)))
