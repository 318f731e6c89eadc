"""Saving by the clock, and stopping because the validation loss no longer falls."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cda_cli.config import Config
from cda_cli.runs.early_stop import Patience
from cda_cli.runs.records import ValidationRecord
from cda_cli.storage import list_steps
from cda_cli.training.schedule import Timer
from tests.training.helpers import Memory, losses, trained


def with_run(config: Config, **run: object) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update=run)})


def test_minutes_pass_and_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    timer, never = Timer(0.5), Timer(0)
    for seconds, passed in ((29.0, False), (30.0, True), (31.0, True)):
        now[0] = seconds
        assert timer.has_passed() is passed
    timer.restart()
    assert not timer.has_passed()
    now[0] = 1e9
    assert timer.has_passed()
    assert not never.has_passed()


def test_patience_counts_validations_in_vain() -> None:
    """A loss that is equal, or not finite, is not lower."""
    patience = Patience(3)
    seen = []
    for loss in (2.0, 3.0, 1.0, 1.0, None, 0.5, float("nan"), 0.75, 0.5):
        patience.add(loss)
        seen.append(patience.over)
    assert seen == [False] * 8 + [True]
    assert Patience(3, [1.0, 2.0, 2.0, 2.0]).over, "what lies behind counts"
    assert not Patience(0, [1.0] * 99).over


def test_a_checkpoint_for_every_moment_of_the_clock(config: Config, tmp_path: Path) -> None:
    """The clock saves besides the steps. An interval shorter than a step saves after each."""
    run = tmp_path / "run"
    trained(with_run(config, save_every=0, save_minutes=1e-9, keep=99, keep_best=False), run)
    assert list_steps(run) == list(range(1, 13))


def stopped_early(config: Config, run: Path) -> Memory:
    """Trains with a learning rate that only makes things worse, and validates at each step."""
    optim = config.optim.model_copy(update={"lr": 50.0, "schedule": "constant", "warmup_steps": 0})
    worse = with_run(config.model_copy(update={"optim": optim}), eval_every=1, save_every=5, patience=2)
    return trained(worse, run)


def test_a_run_without_progress_stops_saves_and_stays_stopped(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    display = stopped_early(config, run)
    validations = [record.loss for record in display.records if isinstance(record, ValidationRecord)]
    last = len(validations)
    assert last < 12
    assert min(validations[:-2]) <= min(validations[-2:])
    assert list(losses(run)) == list(range(1, last + 1))
    assert list_steps(run)[-1] == last, "the last step is not saved"
    assert any(f"stopped early at step {last} of 12: 2 validations in a row" in note for note in display.notes)
    again = stopped_early(config, run)
    assert again.records == []
    assert any("raise --set run.patience to go on" in note for note in again.notes)
    assert list(losses(run)) == list(range(1, last + 1))
