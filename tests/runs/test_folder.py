"""The folder of a run: what is in it, what it may not be, and which checkpoint or settings a path means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cda_cli.config import Config, dump_yaml, resolve
from cda_cli.errors import CheckpointError, ConfigError, StorageError
from cda_cli.runs.folder import Run, config_to_resume, locate_checkpoint, run_to_resume
from cda_cli.storage import CONFIG_FILE, LOCK, publish
from tests.runs.records import TRAIN, VALIDATION


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture(scope="module")
def config() -> Config:
    return resolve("base", flags={"run.seed": 8})


def save(run: Run, step: int, loss: float | None = None, **state: Any) -> Path:
    tensors = {"weight": torch.zeros(1)}
    state |= {"step": step, "validation_loss": loss}
    return publish(run.path, step=step, model=tensors, optimizer={}, rng={}, state=state, keep=9)


def test_a_folder_holds_what_was_put_into_it(run: Run, config: Config) -> None:
    assert (run.config(), list(run.metrics()), run.steps(), run.best()) == (None, [], [], None)
    assert run.newest() == (None, [])
    assert not run.path.exists(), "looking made a folder"
    run.write_config(config)
    metrics = run.open_metrics(0)
    metrics.write(TRAIN)
    metrics.close()
    first, second = save(run, 1, 2.5), save(run, 2, 3.0)
    again = Run(run.path)
    assert again.config() == config
    assert list(again.metrics())[1:] == [TRAIN]
    assert (again.steps(), again.newest(), again.best()) == ([1, 2], (second, []), first)
    again.check()


def test_the_validation_losses_of_a_run_are_those_up_to_a_step(run: Run) -> None:
    metrics = run.open_metrics(0)
    metrics.write(TRAIN)
    for step, loss in ((5, 3.0), (10, float("nan")), (15, 2.0), (20, 1.0)):
        metrics.write(replace(VALIDATION, step=step, loss=loss))
    metrics.close()
    assert repr(run.validation_losses(15)) == "[3.0, nan, 2.0]"


def test_a_run_keeps_its_name_in_trackers(run: Run, tmp_path: Path) -> None:
    """Also where the folder is moved to; and another run has another."""
    name = run.tracker_id()
    assert (run.path / "tracker-id").read_text() == name == Run(run.path).tracker_id()
    assert Run(run.path.rename(tmp_path / "elsewhere")).tracker_id() == name
    assert run.tracker_id() != name


def test_a_folder_has_one_writer(run: Run) -> None:
    with run.lock(pytest.fail), pytest.raises(StorageError, match="is being written by"):
        Run(run.path).lock(pytest.fail).__enter__()
    assert not run.path.exists()


def test_what_a_kill_leaves_before_there_is_a_configuration_is_no_other_folder(run: Run) -> None:
    """The same command must start again, and not ask for another folder."""
    run.path.mkdir()
    (run.path / LOCK).touch()
    (run.path / ".tmp-config.yaml-123-0123abcd").touch()
    run.check()
    (run.path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        run.check()


def test_a_file_is_no_folder(run: Run) -> None:
    run.path.touch()
    with pytest.raises(ConfigError, match="is a file; give --out the name of a folder"):
        run.check()


def test_a_run_goes_on_with_the_settings_of_the_one_named(run: Run, config: Config, tmp_path: Path) -> None:
    other = Run(tmp_path / "other")
    run.write_config(config)
    checkpoint = save(run, 10, config=config.model_dump())
    for place, resume in ((run, "auto"), (other, run.path), (other, run.path / "checkpoints"), (other, checkpoint)):
        assert config_to_resume(place.path, str(resume)) == config
    assert config_to_resume(run.path, "never") is None
    assert config_to_resume(other.path, "auto") is None
    assert config_to_resume(run.path, str(other.path)) is None


def test_a_checkpoint_that_was_copied_has_its_settings_with_it(config: Config, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"step": 3, "config": {"run": {"seed": 8}, "model": {"dim": 32}}}')
    found = config_to_resume(tmp_path / "run", str(tmp_path))
    assert found is not None
    assert (found.run.seed, found.model.dim) == (8, 32)


def test_a_configuration_that_is_a_link_is_refused(run: Run, tmp_path: Path) -> None:
    """A run may come from anywhere, and the link would lead out of it."""
    (tmp_path / "elsewhere").write_text("run:\n  seed: 3\n")
    run.path.mkdir()
    (run.path / CONFIG_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"config\.yaml is a link, or no file; put a file in its place"):
        config_to_resume(run.path, "auto")


@pytest.mark.parametrize(
    ("text", "words"),
    [("[" * 5_000, r"config\.yaml is not valid YAML"), ("optim: {steps: " + "9" * 5_000 + "}", "steps = inf is not")],
)
def test_yaml_that_is_too_much_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ConfigError, match=words):
        Run(tmp_path).config()


def test_a_path_means_the_newest_checkpoint_or_the_best(run: Run) -> None:
    first, second = save(run, 1, 2.5), save(run, 2, 3.0)
    assert locate_checkpoint(run.path) == locate_checkpoint(run.path / "checkpoints") == second
    assert locate_checkpoint(run.path, best=True) == locate_checkpoint(run.path / "checkpoints", best=True) == first
    assert locate_checkpoint(first) == first
    with pytest.raises(CheckpointError, match=r"is one checkpoint; give the folder of its run"):
        locate_checkpoint(first, best=True)


def test_without_a_best_checkpoint_the_remedy_is_named(run: Run) -> None:
    save(run, 1)
    with pytest.raises(CheckpointError, match=r"validated at its step; leave --best out"):
        locate_checkpoint(run.path, best=True)


def test_the_configuration_is_what_dash_dash_config_reads(run: Run, config: Config) -> None:
    run.write_config(config)
    assert (run.path / CONFIG_FILE).read_text(encoding="utf-8") == dump_yaml(config)
    assert resolve(file=run.path / CONFIG_FILE) == config


def test_a_copied_checkpoint_does_not_make_a_run_of_what_lies_above_it(tmp_path: Path) -> None:
    """Any project may have a config.yaml, which the run would write over."""
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    for place, run in (("checkpoints/step-00000004", tmp_path), ("models/copied", None)):
        (tmp_path / place).mkdir(parents=True)
        assert run_to_resume(str(tmp_path / place)) == run
