"""The gradients of a step, batch after batch, and where possible as CUDA graphs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cda_cli.data import IGNORE, Batch
from cda_cli.model import full_tensor
from cda_cli.runtime import to_device
from cda_cli.token_losses import token_losses
from cda_cli.training.distributed.processes import ALONE, Processes


def accumulate_gradients(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    processes: Processes = ALONE,
    graphs: GradientGraphs | None = None,
) -> Tensor:
    """Adds the gradients of the mean loss over the tokens of a step, and returns that loss, a scalar.

    The step is the `batches` of all `processes`. The sum of each batch is divided by the number of tokens of all.
    Accumulation thus equals one large batch, however the processes share its rows. With `graphs` (of this model, in one
    process) gradients start at 0 instead.
    """
    batches = list(batches)
    # The tensor is filled on the device. A copy to a GPU would wait for all work that is queued there.
    targets = torch.full((), sum(map(count_targets, batches)), dtype=torch.int64, device=device)
    tokens = (processes.sum(targets) // processes.mesh.parts).to(torch.float32)  # A group has the same rows.
    total = torch.zeros((), device=device)
    for number, batch in enumerate(batches, start=1):
        with processes.accumulating(model, number, len(batches)):
            if graphs:
                total += graphs.add(batch, tokens, first=number == 1)
            else:
                total += _add_gradients(model, batch, tokens, device, dtype, processes.mesh.groups)
    return processes.sum(total) / processes.mesh.parts


def count_targets(batch: Batch) -> int:
    """Returns the number of targets that have a loss."""
    return int((batch.targets != IGNORE).sum())


def clip_gradients(model: nn.Module, limit: float) -> Tensor:
    """Scales the gradients to a norm of at most `limit`, or leaves them if it is 0, and returns the norm before."""
    return full_tensor(nn.utils.clip_grad_norm_(model.parameters(), limit if limit > 0 else math.inf))


def _add_gradients(
    model: nn.Module, batch: Batch, tokens: Tensor, device: torch.device, dtype: torch.dtype, groups: int = 1
) -> Tensor:
    """Adds the gradients of the sum of a batch's losses over `tokens`, and returns that sum, a scalar.

    With several processes the gradients are scaled by the number of their `groups`. DDP and FSDP take the mean over all
    processes later, and the processes of a group, which have the same losses, add up the gradients of these.
    """
    loss = token_losses(model, batch, device, dtype).sum() / tokens
    (loss * groups).backward()
    return loss.detach()


class GradientGraphs:
    """Forward and backward of a batch as a CUDA graph.

    The host launches a graph at once; it could not launch small kernels one after another as fast as they run.

    The first step runs without graphs, which compiles and warms up. The second captures two graphs: one of the first
    batch of a step, which creates the gradients, and one of a further batch, which adds to them. Graphs replay fixed
    addresses. Gradients therefore stay where they are from step to step, and the tensors within the graphs have a
    `pool` of their own (`torch.cuda.graph_pool_handle`). Graphs of other steps may share it, as no step needs what the
    graphs of the one before have left. All batches must have one shape. `others` are leaves besides the parameters.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, pool: Any, others: Sequence[Tensor] = ()
    ) -> None:
        self._model, self._device, self._dtype, self._pool = model, device, dtype, pool
        self._leaves = [*model.parameters(), *others]
        self._steps = 0
        self._stream = torch.cuda.Stream(device)
        self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._gradients: list[tuple[Tensor, Tensor | None]] = []

    def add(self, batch: Batch, tokens: Tensor, first: bool) -> Tensor:
        """Does what `_add_gradients` does; `first` marks the first batch of a step.

        The next call overwrites the tensor that this one returns.
        """
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
            for leaf, gradient in self._gradients:
                leaf.grad = gradient
        graph.replay()
        return loss

    def _captured(self, first: bool) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Captures a graph, without running it, and returns it with the loss that it writes."""
        graph = torch.cuda.CUDAGraph()
        # Another thread copies the next batches into pinned memory, which must not disturb the capture.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._device), capture:
            loss = _add_gradients(self._model, self._batch, self._tokens, self._device, self._dtype)
        if first:
            self._gradients = [(leaf, leaf.grad) for leaf in self._leaves]
        return graph, loss
