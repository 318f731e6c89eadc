"""Edits of a model: what its layers compute is changed for some forward passes, to measure what the change does.

Shapes: B batch, T queries, H heads, D head width, F feed-forward units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from cda_cli.model.rules import EditRows, Rows
    from cda_cli.model.transformer import Transformer

EditLayer = Callable[[int, Tensor], Tensor]  # from the number of a layer and what it computes to what it shall compute


@dataclass(frozen=True)
class Truncation:
    """An edit of rows that keeps the `keys` keys of each row with the largest weights, besides null keys.

    The rule computes their weights anew, as in a row without the others. Larger scores have larger weights under every
    rule, and also rank the keys that are capped.
    """

    keys: int

    def __call__(self, rows: Rows) -> Tensor:
        """Returns the weights that remain, [B, H, t, S]."""
        return rows.weights(rows.largest(rows.scores, self.keys))


@contextmanager
def editing(
    model: Transformer,
    rows: EditRows | None = None,
    *,
    budget: EditLayer | None = None,
    heads: EditLayer | None = None,
    units: EditLayer | None = None,
) -> Iterator[None]:
    """Within it, each layer of `model` goes on with what these functions return.

    `rows` gets each block of rows of attention weights, `budget` the k of each row [B, H, T], `heads` the outputs of
    the heads [B, T, H, D] before they are projected together, and `units` the activations of the feed-forward [B, T, F]
    before they are projected back. A layer with `rows` computes dense weights, in blocks.
    """
    with ExitStack() as undo:
        for block in model.each_block():
            attention, feed_forward = block.attention, block.feed_forward
            if rows is not None:
                undo.callback(setattr, attention, "edit_rows", None)
                attention.edit_rows = rows
            if budget is not None:
                undo.callback(setattr, attention, "edit_budget", None)
                undo.callback(setattr, attention.rule, "largest_budget", attention.rule.largest_budget)
                attention.edit_budget = budget
                attention.rule.largest_budget = torch.inf
            if heads is not None:
                before = partial(_edit_heads, partial(heads, attention.layer), attention.heads)
                undo.callback(attention.to_out.register_forward_pre_hook(before).remove)
            if units is not None:
                before = partial(_edit_input, partial(units, feed_forward.layer))
                undo.callback(feed_forward.proj_out.register_forward_pre_hook(before).remove)
        yield


def _edit_heads(edit: Callable[[Tensor], Tensor], heads: int, module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    return edit(args[0].unflatten(-1, (heads, -1))).flatten(-2)


def _edit_input(edit: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    return edit(args[0])
