"""A loss or a gradient that is not finite never reaches the weights, the moments or the average of the weights."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cda_cli.training.run
from cda_cli.config import Config
from cda_cli.errors import TrainingError
from cda_cli.runs.folder import Run
from cda_cli.runs.records import Record, RefusedRecord
from cda_cli.signals import StopRequest
from cda_cli.storage import list_steps, load, newest, pack_optimizer
from cda_cli.training.state import RunContext, TrainState
from tests.reliability import micro
from tests.reliability.variants import broken
from tests.training.helpers import Memory, changed

STEPS = 20
VALUES = (float("nan"), float("inf"), float("-inf"))
LIMIT = 3
OPTIM: tuple[dict[str, object], ...] = ({}, {"optimizer": "muon"}, {"ema_decay": 0.9})  # by turns


class Poison:
    """Spoils one value of one training step, and of its repetitions, up to `times` in all.

    It remembers the weights and moments before, and those at each step that was refused.
    """

    def __init__(self, state: TrainState, step: int, place: str, value: float, times: int) -> None:
        self.state, self.step, self.value, self.left = state, step, value, times
        if place == "gradient":
            list(state.model.parameters())[step % 7].register_hook(self._spoilt)
        else:
            # The first block's output is an activation; that of the model goes straight into the loss.
            module = state.model if place == "loss" else state.model.each_block()[0]
            module.register_forward_hook(lambda module, inputs, output: self._spoilt(output))

    def _spoilt(self, tensor: Tensor) -> Tensor:
        if self.state.step != self.step - 1 or not self.left or not self.state.model.training:
            return tensor
        self.left -= 1
        spoilt = tensor.clone()
        spoilt.view(-1)[: max(1, tensor.numel() // 2)] = self.value
        return spoilt


class Watching(Memory):
    """Compares weights, moments and averages at the end of each step with those when the next step is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: str | None = None
        self._state: TrainState | None = None
        self._before: dict[str, Tensor] = {}

    def watch(self, state: TrainState) -> None:
        self._state = state
        self.advance(state.step, None)

    def advance(self, step: int, seconds_left: float | None) -> None:
        self._before = self._tensors()
        if not all(tensor.isfinite().all() for tensor in self._before.values()):
            self.fault = self.fault or f"weights, moments or averages are not finite after step {step}"

    def show(self, record: Record) -> None:
        super().show(record)
        if isinstance(record, RefusedRecord):
            now = self._tensors()
            if any(not new.equal(self._before.get(name, torch.zeros_like(new))) for name, new in now.items()):
                changed = f"weights, moments or averages changed with the refused step {record.step}"
                self.fault = self.fault or changed

    def _tensors(self) -> dict[str, Tensor]:
        """Returns the tensors, with 0 for moments that do not exist yet."""
        assert self._state is not None
        moments, _ = pack_optimizer(self._state.optimizer.state_dict())
        averages = self._state.average.tensors() if self._state.average else {}
        named = self._state.model.state_dict() | moments | {f"average of {name}": one for name, one in averages.items()}
        return {name: tensor.detach().clone() for name, tensor in named.items()}


def poisoned_steps(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Puts NaN, +∞ or −∞ into the loss, a gradient or an activation, at each of 20 steps.

    Once, and the run goes on with the next batch; again and again, and it ends, naming the step and the last good
    checkpoint. AdamW, Muon and an average of the weights take turns.
    """
    cases = list(itertools.product(range(1, STEPS + 1), ("loss", "gradient", "activation"), VALUES, (1, 99)))
    # Spread over the cases, so that few of them are of all kinds.
    chosen = [cases[(number * 37 + seed) % len(cases)] for number in range(min(count, len(cases)))]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setenv("CDA_CACHE", str(folder / "cache"))
        config = micro.settings(micro.mapped_text(folder), eval_every=0)
        for number, (step, place, value, times) in enumerate(chosen):
            optim = OPTIM[number % len(OPTIM)]
            asked = changed(config, steps=STEPS, max_refused=LIMIT, **optim)
            with broken(variant):
                fault = fault_of(asked, folder / str(number), step, place, value, times)
            yield fault and f"{value} in the {place} of step {step}, {times} times, {optim or 'AdamW'}: {fault}"


def fault_of(config: Config, run: Path, step: int, place: str, value: float, times: int) -> str | None:
    display = Watching()
    train = cda_cli.training.run.train

    def poisoned(context: RunContext, state: TrainState, *rest: Any) -> None:
        display.watch(state)
        Poison(state, step, place, value, times)
        train(context, state, *rest)

    said = ""
    with pytest.MonkeyPatch.context() as patch:
        # The door through which the run hands its model to the loop; the loop itself is as it is.
        patch.setattr(cda_cli.training.run, "train", poisoned)
        try:
            with StopRequest() as stop:
                cda_cli.training.run.run_training(config, Run(run), "auto", display, stop)
        except TrainingError as error:
            said = str(error)
    if display.fault:
        return display.fault
    refused = [record.step for record in display.records if isinstance(record, RefusedRecord)]
    if refused != [step] * min(times, LIMIT):
        return f"the steps {refused} were refused"
    found, _ = newest(run)
    for saved in list_steps(run):
        if not all(t.isfinite().all() for t in load(run / "checkpoints" / f"step-{saved:08}").model.values()):
            return f"the checkpoint of step {saved} holds what is not finite"
    if times == 1:
        return None if found and found.name == f"step-{STEPS:08}" and not said else f"{found}, and it said {said!r}"
    good = max((saved for saved in list_steps(run) if saved < step - 1), default=None)
    named = "there is no checkpoint" if good is None else f"step-{good:08}"
    if f"not finite at step {step}, with {LIMIT} batches in a row" not in said or named not in said:
        return f"it said {said!r}"
    return None
