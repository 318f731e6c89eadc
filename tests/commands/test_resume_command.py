"""Going on: what a second `cda train` starts from, and what it drops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cda_cli.storage import load, locate
from tests.commands.helpers import Cda, assert_refused, contents, metrics, steps_saved


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(file: Path, bit: int | None = None) -> None:
    """Flips one bit, of the middle where not given."""
    data = bytearray(file.read_bytes())
    place = len(data) * 4 if bit is None else bit
    data[place // 8] ^= 1 << place % 8
    file.write_bytes(data)


def test_the_same_command_again_resumes_and_redone_steps_replace_theirs(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """A kill between two checkpoints leaves figures of steps that are done again: each must be there once."""
    run = tmp_path / "run"
    cda("train", "--config", tiny, "--out", run)
    whole = metrics(run)
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    (run / "metrics.jsonl").open("a").write('{"step": 7, "kind": "tra')
    result = cda("train", "--config", tiny, "--out", run)
    assert result.code == 0
    assert f"resuming from {run}/checkpoints/step-00000004, step 4" in result.out
    assert "from step 4 to 6" in result.out
    again = metrics(run)
    assert [(record["step"], record["kind"]) for record in again] == [(r["step"], r["kind"]) for r in whole]
    losses = [[record["loss"] for record in records if record["kind"] == "train"] for records in (whole, again)]
    assert losses[0] == losses[1], "the redone steps differ from the first ones"


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(cda: Cda, tiny: Path, run: Path) -> None:
    flip(run / "checkpoints" / "step-00000006" / "model.safetensors")
    result = cda("train", "--config", tiny, "--out", run, "--set", "optim.steps=6")
    assert result.code == 0, result.err
    assert "step-00000006/model.safetensors is damaged" in result.out
    assert "step-00000004, step 4" in result.out
    assert steps_saved(run) == [4, 6]
    assert load(locate(run)).state["step"] == 6, "the damaged checkpoint was not replaced by a whole one"


def test_no_whole_checkpoint_is_an_error_not_a_fresh_start(cda: Cda, tiny: Path, run: Path) -> None:
    """To start from step 0 would throw away what might still be rescued."""
    for step in (4, 6):
        flip(run / "checkpoints" / f"step-{step:08}" / "state.json")
    before = contents(run)
    assert_refused(cda("train", "--config", tiny, "--out", run), "no checkpoint in", "is whole", "another --out")
    assert contents(run) == before


def test_never_refuses_a_folder_with_a_run(cda: Cda, tiny: Path, finished: Path) -> None:
    before = contents(finished)
    refused = cda("train", "--config", tiny, "--out", finished, "--resume", "never")
    assert_refused(refused, "holds another run", "--resume auto")
    assert contents(finished) == before


def test_never_starts_in_a_new_folder(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    result = cda("train", "--config", tiny, "--out", tmp_path / "run", "--resume", "never", "--steps", 1)
    assert result.code == 0
    assert "resuming" not in result.out
    assert steps_saved(tmp_path / "run") == [1]


def test_a_checkpoint_of_another_run_is_gone_on_from_in_a_new_folder(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """The other run stays as it is; the steps count on, with the settings of the checkpoint."""
    before, branch = contents(finished), tmp_path / "branch"
    start = finished / "checkpoints" / "step-00000004"
    result = cda("train", "--out", branch, "--resume", start)
    assert result.code == 0, result.err
    assert f"resuming from {start}, step 4" in result.out
    assert [record["step"] for record in metrics(branch, "train")] == [5, 6]
    assert [r["loss"] for r in metrics(branch, "train")] == [r["loss"] for r in metrics(finished, "train")[4:]]
    assert contents(finished) == before


@pytest.mark.parametrize("place", [".", "checkpoints/step-00000006"])
def test_without_out_a_named_run_goes_on_in_its_own_folder(cda: Cda, run: Path, place: str) -> None:
    """A new run in a folder named after the default preset would surprise, and the next `--resume` would miss it."""
    result = cda("train", "--resume", run / place, "--steps", 7)
    assert result.code == 0, result.err
    assert steps_saved(run)[-1] == 7
    refused = cda("train", "--resume", run / "checkpoints" / "step-00000006", "--steps", 8)
    assert_refused(refused, "is not the newest of", "another --out")


def test_an_older_checkpoint_of_the_same_folder_is_refused(cda: Cda, run: Path) -> None:
    """Its newer checkpoints would stand beside another history."""
    before = contents(run)
    refused = cda("train", "--out", run, "--steps", 8, "--resume", run / "checkpoints" / "step-00000004")
    assert_refused(refused, "is not the newest of", "another --out")
    assert contents(run) == before


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/checkpoints/step-00000004"])
def test_a_path_to_resume_that_is_not_there(cda: Cda, tiny: Path, tmp_path: Path, missing: str) -> None:
    refused = cda("train", "--config", tiny, "--out", tmp_path / "run", "--resume", tmp_path / missing)
    assert_refused(refused, "does not exist", "give a run's folder")
    assert not (tmp_path / "run").exists()


def test_rates_and_intervals_may_change(cda: Cda, run: Path) -> None:
    """Only what makes the model and its data is fixed; a smaller --lr is the remedy for a loss that is not finite."""
    result = cda("train", "--out", run, "--lr", "1e-4", "--save-every", 1, "--steps", 8, "--grad-accum", 2)
    assert result.code == 0, result.err
    assert metrics(run, "train")[-1]["lr"] < 1e-4
    assert metrics(run, "train")[-1]["tokens"] == 6 * 128 + 2 * 256
    assert json.loads((locate(run) / "state.json").read_text())["config"]["optim"]["grad_accum"] == 2


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/step-00000006"])
def test_whatever_names_a_run_brings_its_settings(cda: Cda, finished: Path, tmp_path: Path, place: str) -> None:
    """A run, its checkpoints, or one of them: the default preset in place of its settings would not fit."""
    result = cda("train", "--out", tmp_path / "branch", "--resume", finished / place, "--steps", 7)
    assert result.code == 0, result.err
    assert [record["step"] for record in metrics(tmp_path / "branch", "train")] == [7]


def test_a_checkpoint_is_named_from_within_its_folder(
    cda: Cda, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path has no parents to look for settings in, unless it is resolved."""
    monkeypatch.chdir(finished / "checkpoints")
    result = cda("train", "--out", tmp_path / "branch", "--resume", "step-00000004", "--steps", 5)
    assert result.code == 0, result.err


def test_a_copied_checkpoint_brings_its_settings(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """A checkpoint is whole by itself: the folder of its run need not have come along."""
    copy = shutil.copytree(finished / "checkpoints" / "step-00000004", tmp_path / "copied")
    result = cda("train", "--out", tmp_path / "branch", "--resume", copy, "--steps", 5)
    assert result.code == 0, result.err


def test_a_changed_weight_decay_and_momentum_take_effect(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """The checkpoint's optimizer brings its own; what config.yaml then says must be what was trained with."""
    weights = []
    for name, changes in (
        ("same", []),
        ("decay", ["--set", "optim.weight_decay=50"]),
        ("beta1", ["--set", "optim.beta1=0.1"]),
        ("beta2", ["--set", "optim.beta2=0.1"]),
    ):
        run = Path(shutil.copytree(finished, tmp_path / name))
        assert cda("train", "--out", run, "--steps", 8, *changes).code == 0
        weights.append(load(locate(run)).model["token_embedding.weight"])
    for name, changed in zip(("weight_decay", "beta1", "beta2"), weights[1:], strict=True):
        assert not changed.equal(weights[0]), f"optim.{name} was accepted and had no effect"
