"""Where the processes of a sweep ran, and by what code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cda_cli.sweep import attempts


def test_the_machine_names_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho NVIDIA H200\necho NVIDIA H200\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert attempts.machine().endswith(" cores, 2 × NVIDIA H200")
    program.write_text("#!/bin/sh\necho it found no driver\nexit 9\n")
    assert attempts.machine().endswith(" cores")


def test_a_line_that_was_cut_short_loses_no_other(tmp_path: Path) -> None:
    jobs = ("first", "cut", "last")
    for job in jobs:
        made = attempts.Attempt(
            job=job, command="", began="", seconds=1.0, exit_code=0, error="", machine="", device=""
        )
        attempts.append(tmp_path, made)
        if job == "cut":
            file = tmp_path / attempts.FILE
            file.write_bytes(file.read_bytes()[:-9])
    assert [attempt.job for attempt in attempts.read(tmp_path)] == ["first", "last"]


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git")
def test_code_that_a_checkout_ignores_has_not_its_commit(tmp_path: Path) -> None:
    """A virtual environment often lies in the checkout of another program."""
    package = tmp_path / "cda_cli"
    shutil.copytree(Path(attempts.__file__).parent.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    asked = [sys.executable, "-c", "from cda_cli.sweep.attempts import commit; print(commit())"]

    def commit() -> str:
        return subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert commit() == ""
    subprocess.run([*git, "add", "cda_cli"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "own"], check=True)
    assert len(commit()) == 12
    with (package / "version.py").open("a") as file:
        file.write("# changed\n")
    assert commit().endswith("+")
