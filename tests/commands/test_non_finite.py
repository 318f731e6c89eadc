"""A loss that is no number: no step is taken with it, and where none can be taken any more, the run ends."""

from __future__ import annotations

import re
from pathlib import Path

from cda_cli.storage import load, locate
from tests.commands.helpers import OVERFLOWING, Cda, assert_refused, metrics, steps_saved


def test_the_run_ends_and_names_the_step(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """A checkpoint of weights that give no finite loss is worth nothing."""
    run = tmp_path / "run"
    result = cda("train", "--config", tiny, "--out", run, *OVERFLOWING, "--set", "optim.max_refused=3")
    assert_refused(result, "not finite at step 2, with 3 batches in a row", "smaller --lr", code=1)
    assert not (run / "checkpoints").exists(), "the first was due after step 2"
    assert [record["step"] for record in metrics(run, "train")] == [1]
    assert [(record["step"], record["in_a_row"]) for record in metrics(run, "refused")] == [(2, 1), (2, 2), (2, 3)]
    refused = [line for line in result.out.splitlines() if "refused: loss" in line]
    assert len(refused) == 3
    assert refused[0].startswith("2/6  refused: loss "), refused


def test_weights_that_overflow_are_not_saved(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """The gradient of step 1 is finite, and its weights are not: the next loss would tell, but a checkpoint is due."""
    run = tmp_path / "run"
    overflowing = ("--set", "optim.weight_decay=1e38", "--lr", 1000, "--set", "optim.warmup_steps=0")
    result = cda("train", "--config", tiny, "--out", run, "--save-every", 1, *overflowing)
    assert_refused(result, "is not finite after step 1", "not saved", code=1)
    assert not (run / "checkpoints").exists()


def test_good_checkpoints_stay_and_serve(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """The remedy that is named must work: the checkpoint that is named, with other settings."""
    run = tmp_path / "run"
    cda("train", "--config", tiny, "--out", run, "--steps", 4)
    blown_up = ("--lr", 1000, "--steps", 30)
    result = cda("train", "--config", tiny, "--out", run, "--save-every", 100, *blown_up)
    found = re.search(r"not finite at step (\d+)", result.err)
    assert result.code == 1
    assert found, result.err
    assert int(found[1]) > 5, "the first step with the new rate has still the weights of the checkpoint"
    assert f"the last good checkpoint is {run}/checkpoints/step-00000004; go on from it" in result.err
    assert steps_saved(run) == [2, 4]
    assert all(tensor.isfinite().all() for tensor in load(locate(run)).model.values())
    assert cda("train", "--config", tiny, "--out", run, "--lr", "1e-4").code == 0
    assert [record["step"] for record in metrics(run, "train")] == [1, 2, 3, 4, 5, 6]


def test_what_is_not_finite_is_null_in_the_figures(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """The figures of the layers are taken after the step, when the weights may have overflown already."""
    run = tmp_path / "run"
    cda("train", "--config", tiny, "--out", run, *OVERFLOWING)
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text
    assert "Infinity" not in text
