"""The exponential moving average of a model's weights: a second set of them, which no gradient touches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cda_cli.training.distribution import shard_like


class WeightAverage:
    """After step t: average ← d·average + (1 − d)·weights, with d = min(decay, (1 + t)/(10 + t)).

    The second bound (TensorFlow's) lets the average leave the random weights of the start behind at once. It is a
    function of the step, so the tensors are all there is to save. Each has the dtype and device of its weight.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._average = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def update(self, step: int) -> None:
        """Adds the weights after `step` (1 the first)."""
        decay = min(self._decay, (1 + step) / (10 + step))
        pairs = [(average, weight) for average, weight in self._pairs() if weight.numel()]
        averages, weights = zip(*pairs, strict=True)
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(list(averages), list(weights), step)

    def tensors(self) -> dict[str, Tensor]:
        """By the names of the weights, a shared one once: what a checkpoint holds."""
        return self._average

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts back what `tensors` gave."""
        for name, average in self._average.items():
            average.copy_(shard_like(tensors[name], average))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within it the model has the averaged weights; after it, its own again, to the last bit.

        They change places in memory, one at a time: whatever holds the model's tensors (a compiled graph) sees it.
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
