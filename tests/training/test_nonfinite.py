"""Which steps are refused, how many in a row, what the run then says, and that they leave no trace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cda_cli.config import Config
from cda_cli.data import Batch
from cda_cli.errors import TrainingError
from cda_cli.runs.early_stop import Patience
from cda_cli.runs.folder import Run
from cda_cli.runs.metrics import Metrics
from cda_cli.runs.records import RefusedRecord
from cda_cli.runtime import deterministic
from cda_cli.signals import StopRequest
from cda_cli.storage import pack_optimizer, publish, step_folder
from cda_cli.training.loop import train
from cda_cli.training.nonfinite import Refusals, StepResult, require_finite_weights
from cda_cli.training.setup import build, open_data
from cda_cli.training.state import TrainState
from tests.devices import DEVICES
from tests.training.helpers import Memory, with_settings

ONE = torch.tensor(1.0)
BAD = [torch.tensor(float(word)) for word in ("nan", "inf", "-inf")]


def saved(run: Path, *steps: int) -> None:
    for step in steps:
        publish(run, step=step, model={}, optimizer={}, rng={}, state={"step": step}, keep=9)


def is_refused(refusals: Refusals, loss: Tensor, norm: Tensor) -> bool:
    values = StepResult(loss, norm).read()
    refusals.add(values)
    return not values.is_finite


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_what_is_not_finite_is_refused(tmp_path: Path, bad: Tensor) -> None:
    """The loss alone, the gradient alone, or both are bad. The record names the value."""
    refusals = Refusals(Run(tmp_path), limit=9)
    assert not is_refused(refusals, ONE, ONE)
    assert is_refused(refusals, bad, ONE)
    assert refusals.record(7) == RefusedRecord(step=7, saw=f"loss {bad.item():.4g}, gradient norm 1", in_a_row=1)
    assert is_refused(refusals, ONE, bad)
    assert is_refused(refusals, bad, -bad)
    assert refusals.record(7).in_a_row == 3


def test_only_those_in_a_row_count(tmp_path: Path) -> None:
    """A bad batch now and then costs nothing but itself."""
    refusals = Refusals(Run(tmp_path), limit=2)
    for _ in range(5):
        assert is_refused(refusals, BAD[0], ONE)
        refusals.check(3)
        assert not is_refused(refusals, ONE, ONE)
        refusals.check(3)
    for _ in range(2):
        is_refused(refusals, ONE, BAD[1])
    with pytest.raises(TrainingError, match=r"at step 3, with 2 batches in a row \(loss 1, gradient norm inf\)"):
        refusals.check(3)


def test_the_last_good_checkpoint_is_named(tmp_path: Path) -> None:
    """It is not the checkpoint of the very weights that failed, and not a damaged one."""

    def said(step: int) -> str:
        refusals = Refusals(Run(tmp_path), limit=1)
        is_refused(refusals, *BAD[:2])
        with pytest.raises(TrainingError) as caught:
            refusals.check(step)
        return str(caught.value)

    assert said(5).endswith("start again with a smaller --lr")
    saved(tmp_path, 2, 4)
    assert said(2).endswith("start again with a smaller --lr and another --out")
    assert said(6).endswith(f"{step_folder(tmp_path, 4)}; go on from it (--resume) with a smaller --lr")
    assert said(5).endswith(
        f"{step_folder(tmp_path, 2)}; go on from it (--resume) with a smaller --lr and another --out"
    )
    (step_folder(tmp_path, 4) / "state.json").unlink()
    assert f"{step_folder(tmp_path, 2)}; go on" in said(9)


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_weights_that_are_not_finite_are_named(bad: Tensor) -> None:
    """A step with a finite gradient can still overflow, by its rate or by weight decay."""
    require_finite_weights(3, {"a": torch.ones(4), "none": torch.ones(0), "whole": torch.tensor(3)})
    with pytest.raises(
        TrainingError, match=r"^b is not finite after step 3, so that these weights are not saved; go on"
    ):
        require_finite_weights(3, {"a": torch.ones(4), "b": torch.stack([ONE, bad])})


STEPS = 5


def nan_at(number: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Returns a hook that spoils the output of the `number`-th forward pass of training, counted from 1."""
    passes = itertools.count(1)

    def spoil(model: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * torch.nan if model.training and next(passes) == number else output

    return spoil


def trained_with(config: Config, run: Path, step: int, poisoned: bool) -> TrainState:
    """Trains for STEPS steps. The first batch of `step` has a loss that is not finite, or is left out."""
    data = open_data(config, show_progress=False)
    run.mkdir()
    metrics, display = Metrics(run / "metrics.jsonl", 0), Memory()

    def without_it(position: Any) -> Iterator[tuple[Batch, dict[str, Any]]]:
        return (item for number, item in enumerate(data.open_batches(position), 1) if number != step)

    with deterministic(config.run.deterministic), StopRequest() as stop:
        context, state = build(config, data if poisoned else replace(data, open_batches=without_it))
        if poisoned:
            state.model.register_forward_hook(nan_at(step))
        train(context, state, Run(run), metrics, display, stop, Patience(0))
    metrics.close()
    refused = [record.step for record in display.records if isinstance(record, RefusedRecord)]
    assert refused == [step] * poisoned
    return state


def everything(state: TrainState) -> dict[str, Tensor]:
    """Returns weights, moments with their count of steps, and the average of the weights."""
    averages = state.average.tensors() if state.average else {}
    moments, _ = pack_optimizer(state.optimizer.state_dict())
    return {**state.model.state_dict(), **moments, **{f"average of {name}": one for name, one in averages.items()}}


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("every", [1, 99], ids=["a log line each step", "the next step is launched ahead"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"optim.optimizer": "muon"}, {"optim.ema_decay": 0.5}, {"model.eps_anneal_start": 2.0}],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_a_refused_step_leaves_no_trace(
    config: Config, tmp_path: Path, device: str, changes: dict[str, object], every: int, step: int
) -> None:
    """The run equals, to the last bit, the run that never met that batch."""
    plain = {
        "model.dropout": 0.0, "model.eps_anneal_start": None, "optim.steps": STEPS, "optim.grad_accum": 1,
        "run.device": device, "run.compile": False, "run.deterministic": True, "run.log_every": every,
    }  # fmt: skip
    asked = with_settings(config, plain | changes)
    refused, spared = (trained_with(asked, tmp_path / str(poisoned), step, poisoned) for poisoned in (True, False))
    found, wanted = everything(refused), everything(spared)
    assert any(name.endswith("step") for name in wanted), sorted(wanted)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not found[name].equal(wanted[name])] == []
