"""Measures the losses of a model over windows of a text, in one or several ways, and sums them over each window.

Shapes: B rows of a batch, T positions, W windows, U observations (windows, or groups of them such as documents).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn

from cda_cli.data import IGNORE, Batch
from cda_cli.evaluation.details import Detail
from cda_cli.evaluation.predictions import token_predictions
from cda_cli.model import Transformer
from cda_cli.token_losses import token_losses

# What surrounds the forward passes of a measurement, such as `partial(editing, model, rows)`. It may give another model
# to run.
Way = Callable[[], AbstractContextManager[nn.Module | None]]
AS_IT_IS: Way = nullcontext


@dataclass(frozen=True)
class Sums:
    """What one way of measuring summed over each of W windows, or of U observations; all [W] or [U].

    `nats` are the losses, float64. `tokens` counts the targets and `text_bytes` the bytes of text that these stand for
    (see `Tokens.sizes`), both int64. `details`, float64 [W, …] or [U, …], has what was asked for besides (see
    `cda_cli.evaluation.details`).
    """

    nats: Tensor
    tokens: Tensor
    text_bytes: Tensor
    details: Tensor

    def __len__(self) -> int:
        return len(self.nats)

    @classmethod
    def join(cls, parts: Sequence[Sums]) -> Sums:
        """Joins one or more parts end to end."""
        return cls(*(torch.cat([getattr(part, each.name) for part in parts]) for each in fields(cls)))

    def map(self, change: Callable[[Tensor], Tensor]) -> Sums:
        """Changes each column."""
        return Sums(*(change(getattr(self, each.name)) for each in fields(self)))

    def take(self, chosen: slice) -> Sums:
        """Some of the windows, in the same order."""
        return self.map(lambda column: column[chosen])

    def over(self, group_W: Tensor) -> Sums:
        """Adds up the windows of each group: `group_W`, int64 [W], counts up from 0 without a gap."""
        groups = int(group_W[-1]) + 1
        return self.map(lambda column: column.new_zeros((groups, *column.shape[1:])).index_add(0, group_W, column))


@torch.no_grad()
def measure(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    ways: Sequence[Way] = (AS_IT_IS,),
    advance: Callable[[int], None] = lambda windows: None,
    details: Sequence[Detail] = (),
) -> Iterator[list[Sums]]:
    """Yields for each batch the sums of its windows in each of `ways`.

    The model is in evaluation mode, and gets back its mode at the end. `dtype` is that of the matrix products.
    `advance` gets the number of windows of a batch after each way. `details` are summed besides, of a Transformer.
    """
    training = model.training
    model.eval()
    try:
        for batch in batches:
            counts = (batch.targets != IGNORE).sum(-1)
            found = []
            for way in ways:
                with way() as other:
                    run = model if other is None else other
                    nats, detailed = _of_batch(run, batch, device, dtype, details)
                found.append(Sums(nats, counts, batch.target_bytes, detailed))
                advance(len(batch.inputs))
            yield found
    finally:
        model.train(training)


def _of_batch(
    model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype, details: Sequence[Detail]
) -> tuple[Tensor, Tensor]:
    """Returns the nats of each window, [B], and its details, [B, …], on the CPU."""
    if not details:
        nats = token_losses(model, batch, device, dtype).double().sum(-1).cpu()
        return nats, nats.new_empty(len(nats), 0)
    predicted = token_predictions(cast(Transformer, model), batch, device, dtype)
    parts = [detail.sums(predicted) for detail in details]
    return predicted.losses.double().sum(-1).cpu(), torch.cat(parts, 1).cpu()


def joined(measured: Iterable[list[Sums]]) -> list[Sums]:
    """Returns the sums of all windows in each way, from what `measure` yields."""
    return [Sums.join(parts) for parts in zip(*measured, strict=True)]
