"""Keeps values that are not finite out of the weights, and weights that are not finite out of checkpoints.

A step whose loss or gradient is not finite is refused: its gradients are dropped, and the same step is tried again with
the next batches. One bad batch thus costs a run nothing but itself. Several refusals in a row mean that the weights are
the cause.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.errors import CheckpointError, TrainingError
from cda_cli.plurals import counted
from cda_cli.runs.folder import Run
from cda_cli.runs.records import RefusedRecord
from cda_cli.storage import step_folder, verify


class StepValues(NamedTuple):
    """Loss and gradient norm of a step, and their sum, which is not finite if one of them is not.

    `measured` are the values of its auxiliary losses, by name.
    """

    loss: float
    norm: float
    sum: float
    measured: dict[str, float]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.sum)


class StepResult:
    """Loss and gradient norm of a step, their sum, and what else was `measured`; the host gets a copy of all.

    They are scalars on one device.

    If it is made before the optimizer's kernels are launched, the copy arrives before they have run. The host then has
    that long to launch the next step before the device is idle.
    """

    def __init__(self, loss: Tensor, norm: Tensor, measured: Mapping[str, Tensor] | None = None) -> None:
        self.loss, self.norm, self.sum, self.measured = loss, norm, loss + norm, measured or {}
        self._values = torch.stack((loss, norm, self.sum, *self.measured.values())).to("cpu", non_blocking=loss.is_cuda)
        self._arrived = torch.cuda.current_stream(loss.device).record_event() if loss.is_cuda else None

    def read(self) -> StepValues:
        """Waits for the values."""
        if self._arrived:
            self._arrived.synchronize()
        loss, norm, both, *others = self._values.tolist()
        return StepValues(loss, norm, both, dict(zip(self.measured, others, strict=True)))


class Refusals:
    """Counts the steps refused in a row. The `run` stops at the `limit`-th."""

    def __init__(self, run: Run, limit: int) -> None:
        self._run = run
        self._limit = limit
        self._in_a_row = 0
        self._saw = ""

    def add(self, values: StepValues) -> None:
        """Counts a step with these values: as refused, unless they are finite."""
        if values.is_finite:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self._saw = f"loss {values.loss:.4g}, gradient norm {values.norm:.4g}"

    def record(self, step: int) -> RefusedRecord:
        """The record of step number `step`, which was refused."""
        return RefusedRecord(step=step, saw=self._saw, in_a_row=self._in_a_row)

    def check(self, step: int) -> None:
        """Raises TrainingError once step number `step` was refused for the last time."""
        if self._in_a_row >= self._limit:
            refused = counted(self._in_a_row, "batch", "batches")
            raise TrainingError(
                f"the loss or its gradient was not finite at step {step}, with {refused} in a row "
                f"({self._saw}), and none of it reached the weights; {_remedy(self._run, step - 1)}"
            )


def require_finite_weights(step: int, weights: Mapping[str, Tensor]) -> None:
    """Raises TrainingError, naming the first tensor with an infinity or a NaN among `weights`, those after `step`."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise TrainingError(
                f"{name} is not finite after step {step}, so that these weights are not saved; go on from the newest "
                "checkpoint with a smaller --lr or weight decay"
            )


def _remedy(run: Run, step: int) -> str:
    """Says where to go on from: the newest intact checkpoint before `step`.

    The weights of `step` itself are those that failed; the loss of any earlier weights was finite.
    """
    steps = run.steps()
    for earlier in reversed([one for one in steps if one < step]):
        path = step_folder(run.path, earlier)
        try:
            verify(path)
        except CheckpointError:
            continue
        elsewhere = "" if earlier == steps[-1] else " and another --out"
        return f"the last good checkpoint is {path}; go on from it (--resume) with a smaller --lr{elsewhere}"
    elsewhere = " and another --out" if steps else ""
    return f"there is no checkpoint of earlier weights; start again with a smaller --lr{elsewhere}"
