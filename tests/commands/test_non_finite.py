"""A loss that is no number: the run ends, and no checkpoint holds its weights."""

from __future__ import annotations

import re
from pathlib import Path

from cda_cli.storage import load, locate
from tests.commands.helpers import OVERFLOWING, Cda, assert_refused, metrics, steps_saved


def test_the_run_ends_and_names_the_step(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """Weights that are not finite can never become so again: a checkpoint of them is worth nothing."""
    run = tmp_path / "run"
    result = cda("train", "--config", tiny, "--out", run, *OVERFLOWING)
    assert_refused(result, "not finite at step 2", "smaller --lr", code=1)
    assert not (run / "checkpoints").exists(), "the first was due after step 2"
    assert [record["step"] for record in metrics(run, "train")] == [1]


def test_good_checkpoints_stay_and_serve(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """The remedy that is named must work: the newest checkpoint, with other settings."""
    run = tmp_path / "run"
    cda("train", "--config", tiny, "--out", run, "--steps", 4)
    blown_up = ("--lr", 1000, "--steps", 30)
    result = cda("train", "--config", tiny, "--out", run, "--save-every", 100, *blown_up)
    found = re.search(r"not finite at step (\d+)", result.err)
    assert result.code == 1
    assert found, result.err
    assert int(found[1]) > 5, "the first step with the new rate has still the weights of the checkpoint"
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
