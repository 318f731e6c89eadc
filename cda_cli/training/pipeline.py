"""Keeps the device busy: launches the next step, and inspects this one, before the host has judged this one.

The order of operations decides both speed and bits. Whatever runs ahead must compute what it would compute later.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cda_cli.config import Config, annealed_eps
from cda_cli.data import Batch
from cda_cli.inspection import Recorded, RecordWatcher, inspect
from cda_cli.model import editing
from cda_cli.training.accounting.speed import Speed
from cda_cli.training.distributed.processes import Processes
from cda_cli.training.gradients import accumulate_gradients
from cda_cli.training.schedule import due, is_one_of
from cda_cli.training.state import RunContext, TrainState

# What a log line looks at, tokens and queries: the dense weights are the product of their numbers. With 8192 of both
# a log line took as long as ten steps.
MOST_INSPECTED, MOST_QUERIES = 8192, 1024


class StepAttention(NamedTuple):
    """What changes in the attention from step to step: its ε, and whether rows are truncated."""

    eps: float
    truncated: bool


class PendingStep(NamedTuple):
    """A step whose gradients are computed, or are being computed on the device, and nothing more.

    `batches` are those of this process, and `position` is the position in the data after those of all. `loss` is a
    scalar on the device. `attention` is what attention computes them with. `measured` are the values of the auxiliary
    losses, by name, scalars on the device.
    """

    batches: list[Batch]
    position: dict[str, Any]
    loss: Tensor
    attention: StepAttention
    measured: dict[str, Tensor]


class Pipeline:
    """Hands out steps with `take`, and works ahead in `prefetch`.

    It works ahead only with an optimizer that `steps_at_launch` (see `GuardedOptimizer`). It never launches the first
    step ahead, which compiles and warms up.
    """

    def __init__(self, context: RunContext, state: TrainState, speed: Speed, steps_at_launch: bool) -> None:
        self._context, self._state, self._speed = context, state, speed
        self._steps_at_launch = steps_at_launch
        self._warm = False
        self._pending: PendingStep | None = None
        self._inspection: Inspection | None = None

    def take(self) -> PendingStep:
        """Returns the step that was launched ahead, or else launches one."""
        pending, self._pending = self._pending, None
        context, state = self._context, self._state
        if pending is None:
            return launch_step(context, state, self._speed, state.step)
        if pending.attention == attention_of_step(context.config, state.step):
            return pending
        # The step before was refused, so this step takes its place, and is computed again with its attention.
        state.optimizer.zero_grad(set_to_none=True)
        return compute_gradients(context, state, pending.batches, pending.position, state.step)

    def prefetch(self, batches: list[Batch], inspects: bool) -> None:
        """Launches the next step and, with `inspects`, an inspection of this one on its `batches`.

        Call it once the optimizer's step is launched. The device then takes that step, and the host would wait for its
        loss and norm.
        """
        self._inspection = None
        if not self._steps_at_launch:
            return
        context, state, stream = self._context, self._state, self._context.inspection_stream
        if inspects and stream:
            # The inspection waits for the weights of this step, but not for the next step, which is launched after it.
            stream.wait_stream(torch.cuda.current_stream(context.device))
        # An inspection beside the next step would see the ε of that step.
        anneals = context.config.model.eps_anneal_start is not None
        inspects_beside = stream is not None and not anneals
        if self._warm and may_launch_ahead(context.config, state.step + 1) and (inspects_beside or not inspects):
            self._pending = launch_step(context, state, self._speed, state.step + 1)
        if inspects:
            self._inspection = inspect_first(context, state, batches, stream)

    def step_taken(self) -> None:
        """Call it after each step that was taken, but not after one that was refused."""
        if not self._warm:
            # Compiling leaves half a million objects. A full round of the garbage collector would then take a third of
            # a second, in which nothing is launched.
            if not are_imports_frozen():
                gc.collect()
                gc.freeze()
            self._warm = True

    def recorded(self, batches: list[Batch], eps: float) -> Recorded:
        """Returns what each layer selected in the last step, on its `batches` with its `eps`, and waits for it."""
        if self._inspection is None:
            self._state.model.set_attention_eps(eps)  # The next step may be launched, with its own ε.
        inspection = self._inspection or inspect_first(self._context, self._state, batches)
        return inspection.recorded()


@contextmanager
def restore_gc() -> Iterator[None]:
    """Shows Python's garbage collector at the end what `gc.freeze` has hidden from it.

    What the caller has frozen stays frozen: `gc.unfreeze` would show all of it.
    """
    before = are_imports_frozen()
    try:
        yield
    finally:
        if not before:
            gc.unfreeze()


_found_frozen = False


def are_imports_frozen() -> bool:
    """Whether the program has called `gc.freeze` since it imported PyTorch."""
    global _found_frozen
    # To look at half a million objects takes as long as several small steps, and so does to count them where they are
    # frozen. What was found frozen stays so until all is unfrozen, and meanwhile few are left to look at.
    _found_frozen = (_found_frozen or gc.get_freeze_count() > 0) and all(
        one is not torch.nn.Module for one in gc.get_objects()
    )
    return _found_frozen


def launch_step(context: RunContext, state: TrainState, speed: Speed, step: int) -> PendingStep:
    """Draws the batches of the step with index `step`, counted from 0, and computes their gradients."""
    with speed.waiting():
        batches, position = draw(state, context.processes.share(context.config.optim).batches)
    return compute_gradients(context, state, batches, position, step)


def compute_gradients(
    context: RunContext, state: TrainState, batches: list[Batch], position: dict[str, Any], step: int
) -> PendingStep:
    """Adds the gradients of `batches` with the attention of `step`; a GPU may still compute them afterwards."""
    attention = attention_of_step(context.config, step)
    state.model.set_attention_eps(attention.eps)
    state.auxiliary.begin_step()
    graphs = context.graphs.get(attention.truncated)
    with editing(state.model, rows=context.truncation if attention.truncated else None):
        loss = accumulate_gradients(context.compiled, batches, context.device, context.dtype, context.processes, graphs)
    return PendingStep(batches, position, loss, attention, state.auxiliary.measured(context.processes))


def attention_of_step(config: Config, step: int) -> StepAttention:
    """Returns what the attention does in the step with index `step`, counted from 0."""
    return StepAttention(eps_of_step(config, step), is_one_of(step, config.optim.truncated_share))


def eps_of_step(config: Config, step: int) -> float:
    """Returns the ε of the attention in the step with index `step`, counted from 0."""
    return annealed_eps(config.model, step, config.schedule_steps)


def draw(state: TrainState, count: int) -> tuple[list[Batch], dict[str, Any]]:
    """Returns the next `count` batches, and the position in the data after them."""
    batches, positions = zip(*(next(state.batches) for _ in range(count)), strict=True)
    return list(batches), positions[-1]


def may_launch_ahead(config: Config, step: int) -> bool:
    """Whether the step after `step` may be launched before `step` is judged, so that the device does not wait.

    It then has the same weights and batches as it would have afterwards, as a refused step changes no weights. But
    evaluations, samples and checkpoints that are due after `step` come before the next step. With dropout a step draws
    random numbers, of which a checkpoint must hold those of its own step, and a stop may save any step.
    """
    every = config.run
    anything_due = any(due(step, interval) for interval in (every.eval_every, every.sample_every, every.save_every))
    last = step == config.optim.steps
    return not (last or anything_due or config.model.dropout)


class Inspection(NamedTuple):
    """What each layer selected; a stream may still be computing it."""

    watcher: RecordWatcher
    stream: torch.cuda.Stream | None
    processes: Processes

    def recorded(self) -> Recorded:
        with torch.cuda.stream(self.stream):
            parts = self.processes.mesh.parts
            if parts > 1:  # The first group has the first sequence of all.
                self.watcher.join(lambda seen: self.processes.gather(seen)[:parts])
            return self.watcher.recorded()


def inspect_first(
    context: RunContext, state: TrainState, batches: list[Batch], stream: torch.cuda.Stream | None = None
) -> Inspection:
    """Inspects what each layer selects on the first sequence of a step; the first process has the first of all.

    Of a longer sequence it takes the first MOST_INSPECTED tokens, and of these it observes about MOST_QUERIES.
    """
    chunks = 2 * context.processes.mesh.parts  # equal ones, into which processes divide a sequence
    first = batches[0].map(lambda values: values[:1])
    first = replace(first, inputs=first.inputs[:, : MOST_INSPECTED // chunks * chunks])
    # A module that fsdp compiles in place would otherwise be compiled once more, for this shape.
    with torch.compiler.set_stance("force_eager"), torch.cuda.stream(stream):
        watcher = RecordWatcher(apart=-(-first.inputs.shape[1] // MOST_QUERIES))
        inspect(state.model, [first], context.device, context.dtype, watcher)
        return Inspection(watcher, stream, context.processes)
