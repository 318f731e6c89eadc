"""The exponential moving average of a model's weights: a second set of weights without gradients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cda_cli.training.distributed.sharding import load_shards


class WeightAverage:
    """After step t: average ← d·average + (1 − d)·weights, with d = min(decay, (1 + t)/(10 + t)).

    The second bound is TensorFlow's. With it the average soon forgets the random initial weights. As it depends on the
    step alone, a checkpoint needs only the tensors. Each tensor has the dtype and device of its weight.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._average = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def update(self, step: int) -> None:
        """Adds the weights after `step`, counted from 1."""
        decay = min(self._decay, (1 + step) / (10 + step))
        pairs = [(average, weight) for average, weight in self._pairs() if weight.numel()]
        averages, weights = zip(*pairs, strict=True)
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(list(averages), list(weights), step)

    def tensors(self) -> dict[str, Tensor]:
        """Returns what a checkpoint holds: the tensors by the names of their weights, a shared weight once."""
        return self._average

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned. A weight that is not among them keeps the average that it has."""
        load_shards(self._average, tensors)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Gives the model the averaged weights, and at the end its own again, to the last bit.

        Weights and averages are exchanged in memory, one at a time, so that whatever holds the model's tensors (a
        compiled graph) sees the exchange.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for average, weight in self._pairs():
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return [(self._average[name], weight) for name, weight in self._model.named_parameters()]
