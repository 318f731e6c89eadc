"""Which weights of a run a command takes: the newest checkpoint's, or the best one's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cda_cli.storage import best
from tests.commands.helpers import Cda, assert_refused, metrics, steps_saved


@pytest.fixture
def wandered(cda: Cda, tiny: Path, tmp_path: Path) -> Path:
    """A run whose rate grows out of proportion: its lowest validation loss lies behind it."""
    run = tmp_path / "wandered"
    rising = ("--lr", 1000, "--set", "optim.warmup_steps=1000", "--eval-every", 1, "--save-every", 1, "--steps", 9)
    result = cda("train", "--config", tiny, "--out", run, *rising)
    assert result.code == 0, result.err
    return run


def test_the_best_is_kept_and_can_be_taken(cda: Cda, wandered: Path) -> None:
    validations = {record["step"]: record["loss"] for record in metrics(wandered, "validation")}
    lowest = min(validations, key=lambda step: validations[step])
    assert lowest < 8, "the best is among the newest two, and this test shows nothing"
    assert steps_saved(wandered) == [lowest, 8, 9]
    assert best(wandered) == wandered / "checkpoints" / f"step-{lowest:08}"
    found = {}
    for flags in ((), ("--best",)):
        result = cda("eval", wandered, "--max-batches", 2, "--batch-size", 4, "--json", *flags)
        found[flags] = json.loads(result.out)
    assert found["--best",]["checkpoint"].endswith(f"step-{lowest:08}")
    assert found["--best",]["loss"] == pytest.approx(validations[lowest], rel=1e-6)
    assert found[()]["loss"] == pytest.approx(validations[9], rel=1e-6)


def test_the_average_is_reported_and_can_be_taken(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # A rate at which the weights are soon far from their average.
    result = cda("train", "--config", tiny, "--out", run, "--set", "optim.ema_decay=0.9", "--lr", 0.1)
    assert result.code == 0, result.err
    last = metrics(run, "validation")[-1]
    assert f"averaged weights {last['ema_loss']:.4f}" in result.out
    texts = set()
    for flags, name in (((), "loss"), (("--ema",), "ema_loss")):
        evaluated = cda("eval", run, "--max-batches", 2, "--batch-size", 4, "--json", *flags)
        assert json.loads(evaluated.out)["loss"] == pytest.approx(last[name], rel=1e-6)
        shown = cda("eval", run, "--max-batches", 1, *flags).out
        assert ("averaged weights" in " ".join(shown.split())) is bool(flags)
        texts.add(cda("sample", run, "--prompt", "a", "--max-new-tokens", 40, *flags).out)
    assert last["loss"] != last["ema_loss"]
    assert len(texts) == 2


def test_a_run_without_an_average_says_so(cda: Cda, finished: Path) -> None:
    for command in (("eval",), ("sample", "--prompt", "a"), ("inspect-sparsity",)):
        assert_refused(cda(command[0], finished, *command[1:], "--ema"), "no moving average", "optim.ema_decay")


def test_an_average_can_begin_in_a_resumed_run(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    cda("train", "--config", tiny, "--out", run, "--steps", 2)
    result = cda("train", "--config", tiny, "--out", run, "--set", "optim.ema_decay=0.9")
    assert "the moving average of the weights begins at step 2" in result.out
    assert cda("eval", run, "--max-batches", 1, "--ema").code == 0


def test_there_may_be_no_best(cda: Cda, tiny: Path, tmp_path: Path, finished: Path) -> None:
    checkpoint = finished / "checkpoints" / "step-00000004"
    for command in (("eval",), ("sample", "--prompt", "a"), ("inspect-sparsity",)):
        assert_refused(cda(command[0], checkpoint, *command[1:], "--best"), "give the folder of its run")
