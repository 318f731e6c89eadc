"""Watching a forward pass: what each layer selected, for inspection and for the live figures of training.

While a module's `observer` is set, it computes its weights densely and hands them over, at most `OBSERVED` of them at a
time, or one row: so memory is not O(T × S).
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


OBSERVED = 2**24  # of 8192 keys and 8 heads 256 rows: in float64, as they are measured, 128 MiB a copy


class AttentionSeen(NamedTuple):
    """Attention of one layer, or some of its rows: weights [B, H, T, S], and the k of each row [B, H, T].

    The first `null` keys are null keys; row 0 is the query at `position`, which sees the keys up to that one.
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
    """Within it, each layer calls `observer` in a forward pass: attention for all rows, in order; feed-forward once."""
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
