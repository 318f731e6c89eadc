"""`cda train --dry-run`: the plan, and not a trace of it left behind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from cda_cli import main
from cda_cli.settings import preset_names
from tests.commands.helpers import Cda, assert_refused, contents


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every place that something could be left in, all below one empty folder."""
    folder = tmp_path / "home"
    (folder / "tmp").mkdir(parents=True)
    for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    monkeypatch.chdir(folder)
    return folder


def test_it_prints_the_plan_and_writes_nothing(cda: Cda, tiny: Path, finished: Path, tmp_path: Path) -> None:
    """A dry run that leaves a folder makes the run after it a resumed one; tokens in the cache cost space unseen."""
    assert finished.exists(), "PyTorch, which leaves a folder where it is first used, was used before"
    before = contents(tmp_path)
    result = cda("train", "--config", tiny, "--out", tmp_path / "run", "--dry-run")
    assert result.code == 0, result.err
    for words in (
        f"{tmp_path}/run", "33.6 k parameters", "6, of 128 tokens", "passes over the text", "float32",
        "torch, exact solver", "loss of a batch", "weights 131 KiB, gradients 131 KiB, AdamW 262 KiB", "peak",
        "nothing was written",
    ):  # fmt: skip
        assert words in result.out
    forecast, tried = result.out.index("memory, forecast"), result.out.index("loss of a batch")
    assert forecast < tried, "a batch that uses up the memory would leave nothing said"
    assert contents(tmp_path) == before


def test_a_run_in_the_folder_stays_as_it_is(cda: Cda, finished: Path) -> None:
    """It tells what would be gone on from."""
    before = contents(finished)
    result = cda("train", "--out", finished, "--steps", 9, "--dry-run")
    assert result.code == 0, result.err
    assert "from step 6 to 9" in result.out
    assert contents(finished) == before


def test_what_training_would_refuse_is_refused(cda: Cda, tiny: Path, finished: Path, tmp_path: Path) -> None:
    assert_refused(cda("train", "--config", tiny, "--out", finished, "--attn-k", 1, "--dry-run"), "model.attn_k")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes").touch()
    assert_refused(cda("train", "--config", tiny, "--out", taken, "--dry-run"), "is not empty")


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_builds(cda: Cda, text: Path, tmp_path: Path, preset: str) -> None:
    """A preset with a setting that is gone, or settings that do not go together, fails for whoever tries it first."""
    sized = ("model.dim=48", "model.depth=1", "model.ff_k=16")
    smaller = [part for setting in sized for part in ("--set", setting)]
    out = ("--out", tmp_path / "run", "--dry-run")
    result = cda("train", "--preset", preset, *smaller, "--seq-len", 32, "--batch-size", 1, "--data", text, *out)
    assert result.code == 0, result.err
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_fit_is_not_tried(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """It would take a terabyte, and the kernel would kill the process before a word is said."""
    result = cda("train", "--config", tiny, "--out", tmp_path / "run", "--dry-run", "--batch-size", 3_000_000)
    assert result.code == 0, result.err
    assert "not tried, as the forecast is more than the memory that is free" in " ".join(result.out.split())
    assert "memory, forecast  peak" in result.out
    assert "loss of a batch" not in result.out


def test_memory_that_is_used_up_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """On a CPU PyTorch raises no error of its own kind."""
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (refused.value, MemoryError()):
        main._explain(error)
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "--grad-accum" in said
