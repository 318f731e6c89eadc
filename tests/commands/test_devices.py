"""`cda train --devices`: torchrun's launcher around the command, which stops, fails and answers as one process does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.commands.forked import popen_forked
from tests.commands.helpers import Cda, assert_refused, metrics, steps_saved


@pytest.mark.parametrize(
    ("number", "to_launcher", "parallel"), [(signal.SIGINT, True, "fsdp"), (signal.SIGTERM, False, "ddp")]
)
def test_a_signal_to_any_process_stops_all(
    tiny: Path, tmp_path: Path, number: signal.Signals, to_launcher: bool, parallel: str
) -> None:
    """At the same step, which is saved once; the launcher's exit code is that of the signal."""
    run = tmp_path / "run"
    with popen_forked(
        "train", "--config", tiny, "--out", run, "--devices", 2, "--parallel", parallel, "--steps", 1_000_000,
        "--save-every", 0, "--eval-every", 0,
    ) as launcher:  # fmt: skip
        lines = iter(launcher.stdout.readline, "")
        said = [next(line for line in lines if line.lstrip().startswith("3/"))]
        second = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text(encoding="utf-8").split()[1]
        os.kill(launcher.pid if to_launcher else int(second), number)
        said += [line for line in lines if "/1000000  loss" in line]
        error = launcher.stderr.read()
        assert launcher.returncode == 128 + number, error
    last = int(said[-1].split("/")[0])
    assert error == f"stopped at step {last} of 1000000, and saved; the same command goes on from there\n"
    assert steps_saved(run) == [last]
    assert [record["step"] for record in metrics(run, "train")] == list(range(1, last + 1))


def test_an_error_is_one_sentence(cda: Cda, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both processes meet it; the launcher, which is this process, returns its exit code, and adds nothing."""
    launched = cda("train", "--config", tiny, "--out", tmp_path / "run", "--devices", 2, "--data", "nowhere")
    assert launched == (2, "", "")
    said = capfd.readouterr()
    assert said.err.startswith("error: there is no file nowhere; give --data a file, a glob, a folder, ")
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_what_cannot_be_shared_is_said_before_anything_starts(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    command = ("train", "--config", tiny, "--out", tmp_path / "run", "--devices", 3)
    assert_refused(cda(*command), "4 sequences", "3 processes", "a multiple of 3")
    assert_refused(cda(*command, "--batch-size", 3, "--dry-run"), "--dry-run", "leave out --devices")
    assert_refused(cda(*command, "--batch-size", 3, "--device", "cuda:1"), "--device cuda:1 is for one process")
    assert not (tmp_path / "run").exists()
