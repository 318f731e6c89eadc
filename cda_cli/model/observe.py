"""Observes what each layer of a forward pass selects, for inspection and for the live metrics of training.

While the `observer` of an attention layer is set, the layer computes dense weights and passes them on in blocks of
rows, so that memory does not grow as O(T × S) (see `rules.base.BLOCK_SCORES`). Where it observes some of the queries
alone, the time does not grow so either.
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


class ObservedAttention(NamedTuple):
    """The attention of one layer, or some of its rows: weights [B, H, T, S], and the k of each row [B, H, T].

    The first `null_keys` keys are null keys. Row 0 is the query at `position`, which sees the keys up to that position,
    and each row after it is the query `apart` positions further on.
    What the keys of a head add to the residual stream is `output_scale` [B, H, T] (the gate, and 1/k where the layer
    divides by it) times the weights times `values` [B, H, S, D] times its columns of `to_out` [C, H · D],
    which is None where it is not known.

    The scores of a row, of which ε is the temperature, are the products of its query, one of `queries` [B, H, T, D],
    with `keys` [B, H, S, D]. They are None where the model does not tell them.

    `visible`, bool [T, S], says which of these keys each query sees; it is None where a query sees all of them.
    """

    layer: int
    weights: Tensor
    sparsity_k: Tensor
    null_keys: int
    position: int
    values: Tensor
    to_out: Tensor | None
    output_scale: Tensor
    queries: Tensor | None = None
    keys: Tensor | None = None
    visible: Tensor | None = None
    apart: int = 1


class ObservedFeedForward(NamedTuple):
    """The activations of one feed-forward layer, [B, T, F], F units, and the matrix [C, F] that takes them back.

    A router chooses among N blocks of neighbouring units: `chosen`, bool [B, T, N], or None without a router.
    """

    layer: int
    activations: Tensor
    to_out: Tensor
    chosen: Tensor | None = None


Observer = Callable[[ObservedAttention | ObservedFeedForward], None]


@contextmanager
def observing(model: Transformer, observer: Observer, apart: int = 1) -> Iterator[None]:
    """Within it, each layer of a forward pass calls `observer`.

    An attention layer calls it for each block of rows, in order, and a feed-forward layer calls it once. Of the queries
    of an attention layer it sees one in `apart`.
    """
    observed: list[Attention | FeedForward] = []
    for block in model.each_block():
        observed += (block.attention, block.feed_forward)
        block.attention.observed_apart = apart
    try:
        for module in observed:
            module.observer = observer
        yield
    finally:
        for module in observed:
            module.observer = None
