"""A run that was cut anywhere ends where an uninterrupted one does, to the last bit, on a CPU in float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from cda_cli.config import Config
from cda_cli.errors import InterruptedRunError
from cda_cli.storage import locate
from tests.training.helpers import changed, losses, trained


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps without a cut."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDA_CACHE", str(folder / "cache"))
        trained(config, folder / "run")
    assert sorted(losses(folder / "run")) == list(range(1, 13))
    return folder / "run"


def assert_same_end(run: Path, whole: Path) -> None:
    assert losses(run) == losses(whole), "a loss differs: data, dropout, weights or optimizer were not restored"
    names = {file.name for file in locate(whole).iterdir()}
    assert {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"} < names
    for name in sorted(names):
        assert (locate(run) / name).read_bytes() == (locate(whole) / name).read_bytes(), f"{name} differs at the end"


@pytest.mark.parametrize("cuts", [[1], [4], [11], [3, 4, 9], list(range(1, 12))])
def test_a_run_that_ended_early_and_goes_on(config: Config, whole: Path, tmp_path: Path, cuts: list[int]) -> None:
    """Also across a validation, a sample and a checkpoint, which must not draw from what training draws from."""
    for steps in [*cuts, 12]:
        trained(changed(config, steps=steps), tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_run_that_was_stopped_and_goes_on(config: Config, whole: Path, tmp_path: Path, step: int) -> None:
    """The step in hand when the signal came is in the checkpoint, whole."""
    with pytest.raises(InterruptedRunError, match=f"stopped at step {step} of 12, and saved"):
        trained(config, tmp_path / "run", stop_after=step)
    assert list(losses(tmp_path / "run")) == list(range(1, step + 1))
    assert locate(tmp_path / "run").name == f"step-{step:08}"
    trained(config, tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


def test_steps_after_the_last_checkpoint_are_redone_the_same(config: Config, whole: Path, tmp_path: Path) -> None:
    """A kill leaves figures of steps that no checkpoint has; done again, they are the same."""
    run = tmp_path / "run"
    trained(changed(config, steps=4), run)
    with pytest.raises(InterruptedRunError):
        trained(config, run, stop_after=6)
    first = losses(run)
    for file in (run / "checkpoints" / "step-00000006").iterdir():
        file.unlink()
    trained(config, run)
    assert {step: loss for step, loss in losses(run).items() if step <= 6} == first
    assert_same_end(run, whole)


@pytest.mark.parametrize("settings", [{"optimizer": "muon"}, {"ema_decay": 0.6}], ids=str)
def test_what_is_on_request_goes_on_as_exactly(config: Config, tmp_path: Path, settings: dict[str, object]) -> None:
    """State of other optimizers and averages."""
    asked = changed(config, **settings)
    trained(asked, tmp_path / "whole")
    for steps in (2, 5, 12):
        trained(changed(asked, steps=steps), tmp_path / "run")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_another_seed_is_another_run(config: Config, whole: Path, tmp_path: Path) -> None:
    """Else the equalities above would show nothing."""
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    trained(other, tmp_path / "run")
    assert not set(losses(tmp_path / "run").values()) & set(losses(whole).values())
