"""Trackers get the numbers of a run through their own libraries, and a resumed run goes on in the same place."""

from __future__ import annotations

import importlib.util
import sqlite3
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cda_cli.config import Config, parse
from cda_cli.errors import ConfigError
from cda_cli.runs.records import TrainRecord
from cda_cli.training.trackers import check_trackers
from tests.training.helpers import Memory, changed, losses, trained


def tracked(config: Config, run: Path, *trackers: str, cuts: tuple[int, ...] = (5, 12)) -> list[Memory]:
    """Trains a run with these trackers, in parts."""
    asked = config.model_copy(update={"run": config.run.model_copy(update={"track": list(trackers)})})
    return [trained(changed(asked, steps=steps), run) for steps in cuts]


def scalars(run: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def test_tensorboard_has_every_number_across_a_resume(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    displays = tracked(config, run, "tensorboard")
    assert scalars(run, "train/loss") == pytest.approx(losses(run), rel=1e-6)
    records = [record for display in displays for record in display.records if isinstance(record, TrainRecord)]
    support = {record.step: record.layers[1].effective_support for record in records}
    assert scalars(run, "train/layer 1/effective_support") == pytest.approx(support, rel=1e-6)
    assert sorted(scalars(run, "validation/loss")) == [5, 10, 12]


def test_tensorboard_hides_what_is_done_again(config: Config, tmp_path: Path) -> None:
    """Otherwise the steps after the checkpoint would be there twice."""
    run = tmp_path / "run"
    tracked(config, run, "tensorboard", cuts=(4, 6))
    for file in (run / "checkpoints" / "step-00000006").iterdir():
        file.unlink()
    tracked(config, run, "tensorboard", cuts=(7,))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 8))


def test_weights_and_biases_goes_on_with_the_same_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline there are two parts with one identity, which `wandb sync` joins."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked(config, tmp_path / "run", "wandb", cuts=(1, 2))
    identity = (tmp_path / "run" / "tracker-id").read_text()
    parts = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    for part in parts:
        assert b"train/loss" in (part / f"run-{identity}.wandb").read_bytes()


def test_trackio_goes_on_with_the_same_run(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read once, when it is first imported
    from trackio.utils import TRACKIO_DIR

    tracked(config, tmp_path / "run", "trackio")
    identity = (tmp_path / "run" / "tracker-id").read_text()
    with sqlite3.connect(Path(TRACKIO_DIR) / "cda.db") as base:
        query = "select step from metrics where run_name = ? and instr(metrics, 'train/loss') order by step"
        assert [step for (step,) in base.execute(query, (f"run-{identity}",))] == list(range(1, 13))


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch, config: Config, tmp_path: Path) -> None:
    """The error comes before any data is prepared, with the command that installs the library."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers([])
    with pytest.raises(ConfigError, match=r"wandb is not installed; install it \(pip install wandb\)"):
        tracked(config, tmp_path / "run", "wandb")
    assert not (tmp_path / "run").exists()


def test_trackers_are_named_in_a_list_or_with_commas() -> None:
    for given in ("wandb,tensorboard", " wandb , tensorboard ", ["wandb", "tensorboard"]):
        assert parse({"run": {"track": given}}).run.track == ["wandb", "tensorboard"]
    assert parse({"run": {"track": ""}}).run.track == []
    with pytest.raises(ConfigError, match="'tensorboard', 'wandb' or 'trackio'"):
        parse({"run": {"track": "wandb,mlflow"}})
