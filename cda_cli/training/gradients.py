"""The gradients of a step: of its batches one after another, and where that is possible as CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from cda_cli.data import IGNORE, Batch
from cda_cli.runtime import to_device
from cda_cli.token_losses import token_losses
from cda_cli.training.distribution import ALONE, Processes, full_tensor


def accumulate_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes = ALONE,
    graphs: GradientGraphs | None = None,
) -> Tensor:
    """Adds the gradients of the mean loss over the tokens of all `batches`, and returns that loss, a scalar.

    Each batch's sum is divided by the tokens of all, so that accumulation, and the sharing of rows among processes,
    equal one large batch. With `graphs` (of this model, for one process) gradients start at 0.
    """
    batches = list(batches)
    # Filled there: a copy would wait for all that a GPU has in hand.
    tokens = torch.full((), float(sum(int((batch.targets != IGNORE).sum()) for batch in batches)), device=device)
    total = torch.zeros((), device=device)
    shared = processes.share(batches)
    for number, batch in enumerate(shared, start=1):
        with processes.accumulating(model, number, len(shared)):
            if graphs:
                total += graphs.add(batch, tokens, first=number == 1)
            else:
                total += _add_gradients(model, batch, tokens, device, dtype, processes.count)
    return processes.sum(total)


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scales the gradients to a norm of at most `limit` (0: leaves them) and returns the norm they had."""
    return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), limit if limit > 0 else math.inf))


def _add_gradients(
    model: nn.Module, batch: Batch, tokens: Tensor, device: torch.device, dtype: torch.dtype, processes: int = 1
) -> Tensor:
    """Adds those of a batch's losses / `tokens`, and returns their sum. The mean over `processes` is taken later."""
    loss = token_losses(model, batch, device, dtype).sum() / tokens
    (loss * processes).backward()
    return loss.detach()


class GradientGraphs:
    """Forward and backward of a batch as a CUDA graph: the host launches it whole, where it could not launch one kernel
    after the other as fast as they run.

    The first step runs as ever, which compiles and warms up. In the second, two graphs are captured: of the first batch
    of a step, which makes the gradients, and of a further one, which adds to them. They know their tensors by their
    places: gradients keep theirs from step to step, and so does, set apart for the graphs, what comes and goes within
    them. Batches are of one shape.
    """

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._device, self._dtype = model, device, dtype
        self._steps = 0
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._gradients: list[tuple[nn.Parameter, Tensor | None]] = []

    def add(self, batch: Batch, tokens: Tensor, first: bool) -> Tensor:
        """As `_add_gradients` does; `first` of the step. The next call writes over what this one returns."""
        self._steps += first
        if self._steps == 1:
            return _add_gradients(self._model, batch, tokens, self._device, self._dtype)
        if not self._graphs:
            self._batch = batch.map(lambda values: to_device(values, self._device))
            self._tokens = tokens.clone()
        self._batch.inputs.copy_(batch.inputs, non_blocking=True)
        self._batch.targets.copy_(batch.targets, non_blocking=True)
        self._tokens.copy_(tokens)
        if first not in self._graphs:
            self._graphs[first] = self._captured(first)
        graph, loss = self._graphs[first]
        if first:
            for parameter, gradient in self._gradients:
                parameter.grad = gradient
        graph.replay()
        return loss

    def _captured(self, first: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph, which has not run, and the loss that it writes."""
        graph = torch.cuda.CUDAGraph()
        pool = None if first else self._graphs[True][0].pool()
        # What another thread does is not in it: one brings the next batches into pinned memory.
        capture = torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            loss = _add_gradients(self._model, self._batch, self._tokens, self._device, self._dtype)
        if first:
            self._gradients = [(parameter, parameter.grad) for parameter in self._model.parameters()]
        return graph, loss
