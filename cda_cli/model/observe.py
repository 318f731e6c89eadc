"""Observing a forward pass: what each layer selected, for inspection and for the live metrics of training.

While a module's `observer` is set, the module computes dense weights and hands them over in blocks of rows, so that
memory does not grow as O(T × S) (see `rules.base.BLOCK_SCORES`).
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
    """Attention of one layer, or some of its rows: weights [B, H, T, S], and the k of each row [B, H, T].

    The first `null` keys are null keys. Row 0 is the query at `position`, which sees the keys up to that position.
    """

    layer: int
    weights: Tensor
    sparsity_k: Tensor
    null: int
    position: int


class FeedForwardSeen(NamedTuple):
    """Activations of one feed-forward layer, [B, T, hidden]."""

    layer: int
    activations: Tensor


Observer = Callable[[AttentionSeen | FeedForwardSeen], None]


@contextmanager
def observing(model: Transformer, observer: Observer) -> Iterator[None]:
    """Within it, each layer of a forward pass calls `observer`: attention for all rows, in order; feed-forward once."""
    observed: list[Attention | FeedForward] = []
    for block in model.each_block():
        observed += (block.attention, block.feed_forward)
    try:
        for module in observed:
            module.observer = observer
        yield
    finally:
        for module in observed:
            module.observer = None
