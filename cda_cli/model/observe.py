"""Watching a forward pass: what each layer selected, for inspection and for the live figures of training.

While a module's `observer` is set, it computes its weights densely and hands them over; memory is then O(T × S), so
observe a few sequences at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from cda_cli.model.attention import Attention
    from cda_cli.model.feed_forward import FeedForward
    from cda_cli.model.transformer import Transformer


class AttentionSeen(NamedTuple):
    """Attention of one layer: weights [B, H, T, S] (null keys first), and the k of each row [B, H, T]."""

    layer: int
    weights: Tensor
    sparsity_k: Tensor


class FeedForwardSeen(NamedTuple):
    """Activations of one feed-forward layer, [B, T, hidden]."""

    layer: int
    activations: Tensor


Observer = Callable[[AttentionSeen | FeedForwardSeen], None]


@contextmanager
def observing(model: Transformer, observer: Observer) -> Iterator[None]:
    """Within it, each layer calls `observer` once a forward pass."""
    watched: list[Attention | FeedForward] = []
    for block in model.each_block():
        watched += (block.attention, block.feed_forward)
    try:
        for module in watched:
            module.observer = observer
        yield
    finally:
        for module in watched:
            module.observer = None
