"""A disk that is full while training, as a limit on the size of files makes it: what was saved stays whole."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import pytest

from cda_cli.runs.folder import saved_config
from cda_cli.storage import load, locate, newest
from cda_cli.training.accounting.disk_space import OTHER_BYTES, checkpoint_bytes
from cda_cli.training.setup import build, open_data
from tests.commands.helpers import Cda, Result, assert_refused, metrics, run_cda


@pytest.fixture
def run(tmp_path: Path, finished: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def limited(limit: int, *arguments: object) -> Result:
    """`cda ARGS` while no file of this process may grow beyond `limit` bytes."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        return run_cda(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))


def assert_one_sentence(done: Result, word: str) -> None:
    assert done.code == 2, done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert "unexpected" not in done.err
    assert word in done.err


def test_a_checkpoint_that_does_not_fit(cda: Cda, run: Path) -> None:
    """The optimizer's file is the first beyond 200 KiB: a folder with the model alone must not be left."""
    done = limited(200 * 1024, "train", "--out", run, "--steps", 8)
    assert_one_sentence(done, "what was saved earlier is whole")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
    found, damaged = newest(run)
    assert found is not None
    assert damaged == []
    assert load(found).state["step"] == 6
    assert cda("train", "--out", run, "--steps", 8).code == 0
    assert [record["step"] for record in metrics(run, "train")] == list(range(1, 9)), (
        "a step was lost or is there twice"
    )


def test_figures_that_do_not_fit(cda: Cda, run: Path) -> None:
    """Half a log line is left at most, and the next run takes it away."""
    assert cda("eval", run, "--max-batches", 1).code == 0, "the tokens are in the cache now"
    done = limited((run / "metrics.jsonl").stat().st_size + 300, "train", "--out", run, "--steps", 8)
    assert_one_sentence(done, "metrics.jsonl cannot be written")
    assert newest(run)[0] == run / "checkpoints" / "step-00000006"
    assert cda("train", "--out", run, "--steps", 8).code == 0
    assert [record["step"] for record in metrics(run, "train")] == list(range(1, 9))


def test_tokens_that_do_not_fit(tiny: Path, tmp_path: Path) -> None:
    """The first thing that is written is the cache: no run folder yet, and no half of the tokens."""
    done = limited(4096, "train", "--config", tiny, "--out", tmp_path / "run")
    assert_one_sentence(done, "CDA_CACHE")
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


@pytest.mark.parametrize(("keep_best", "count"), [("true", "1000000002"), ("false", "1000000001")])
def test_checkpoints_that_can_never_fit_are_said_at_the_start(
    cda: Cda, tiny: Path, tmp_path: Path, keep_best: str, count: str
) -> None:
    """Not after hours, when the first is due. A billion of them fit on no disk."""
    settings = ("--set", "run.keep=1000000000", "--set", f"run.keep_best={keep_best}")
    result = cda("train", "--config", tiny, "--out", tmp_path / "run", *settings)
    assert_refused(result, "free, and the checkpoints of this run need", f"({count} of 1.4 MiB, 0 there)", "--out")
    assert not (tmp_path / "run").exists()


def test_what_is_said_of_a_checkpoint_is_its_size(finished: Path) -> None:
    """Else a run would be refused for nothing, or end in a full disk."""
    checkpoint = load(locate(finished))
    files = sum(file.stat().st_size for file in checkpoint.path.iterdir())
    config = saved_config(checkpoint)
    data = open_data(config, show_progress=False)
    _, state = build(config, data, checkpoint)
    said = checkpoint_bytes(state)
    assert files < said < files + OTHER_BYTES


def test_so_is_what_is_said_with_muon_and_an_average(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """Muon keeps one tensor like each of its weights, where AdamW keeps two; the average is a third part."""
    settings = ("--steps", "2", "--set", "optim.optimizer=muon", "--set", "optim.ema_decay=0.9")
    done = cda("train", "--config", tiny, "--out", tmp_path / "run", *settings)
    assert done.code == 0, done.err
    test_what_is_said_of_a_checkpoint_is_its_size(tmp_path / "run")
