"""Streams that are closed, full or gone: the right exit code, one sentence at most, and no step lost."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.commands.forked import Streams, popen_forked, run_forked
from tests.commands.helpers import in_subprocess, metrics, steps_saved

CLOSED: Streams = {0: None, 1: None, 2: None}
NO_SPACE: Streams = {1: "/dev/full", 2: "/dev/full"}
FULL = "stdout cannot be written (No space left on device); send it elsewhere"


def in_shell(streams: Streams, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`cda ARGUMENTS` in an interpreter that a shell starts with these streams."""
    redirections = (f"{number}>{'&-' if file is None else file}" for number, file in streams.items())
    command = ["sh", "-c", f'exec "$@" {" ".join(redirections)}', "sh", *in_subprocess(*arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ({1: None}, 0, ""),
        (CLOSED, 0, ""),
        ({2: None}, 0, ""),
        ({1: "/dev/full"}, 2, f"error: {FULL}\n"),
        (NO_SPACE, 2, ""),
    ],
)
def test_what_the_parser_prints(streams: Streams, code: int, said: str) -> None:
    version = in_shell(streams, "--version")
    assert (version.returncode, version.stderr) == (code, said)
    usage = run_forked("train", "--help", streams=streams)
    assert (usage.code, usage.err) == (code, said)


@pytest.mark.parametrize(
    ("arguments", "streams", "code", "said"),
    [
        (["eval"], CLOSED, 0, ""),
        (["eval"], {1: "/dev/full"}, 2, f"error: {FULL}\n"),
        (["runs", "--json"], {1: "/dev/full"}, 2, f"error: {FULL}\n"),
        (["sample"], {0: None}, 2, "error: stdin is empty; give --prompt TEXT, --prompts FILE, or text on stdin\n"),
    ],
)
def test_what_a_command_prints(finished: Path, arguments: list[str], streams: Streams, code: int, said: str) -> None:
    """A closed stream is nobody's wish; a full one loses what was asked for."""
    done = run_forked(*arguments, finished, streams=streams)
    assert (done.code, done.err) == (code, said)


def test_an_error_is_an_error_without_streams(tmp_path: Path) -> None:
    for streams in (CLOSED, NO_SPACE):
        assert in_shell(streams, "train", "--attn-k", "0", "--out", tmp_path / "run").returncode == 2


def test_a_file_does_not_take_the_place_of_a_closed_stream(tiny: Path, tmp_path: Path) -> None:
    """The first file that a process opens gets the lowest free number: what is printed would go into it."""
    run = tmp_path / "run"
    done = in_shell(CLOSED, "train", "--config", tiny, "--out", run)
    assert done.returncode == 0
    assert [record["step"] for record in metrics(run, "train")] == list(range(1, 7))
    assert (run / ".lock").read_bytes() == b"" if (run / ".lock").exists() else True


def test_a_closed_pipe_saves_the_run(tiny: Path, tmp_path: Path) -> None:
    """`cda train … | head` is a way to look at a run, and no way to lose it."""
    run = tmp_path / "run"
    settings = ("train", "--config", tiny, "--out", run, "--steps", 1_000_000, "--save-every", 0, "--eval-every", 0)
    with popen_forked(*settings) as cda:
        assert any(line.lstrip().startswith("3/") for line in iter(cda.stdout.readline, ""))
        cda.stdout.close()
        error = cda.stderr.read()
        assert cda.returncode == 141, error
    last = metrics(run, "train")[-1]["step"]
    assert steps_saved(run) == [last]
    assert error == (
        f"stdout can no longer be written (Broken pipe); stopped at step {last} of 1000000, and saved; "
        f"`cda train --out {run}` goes on from there\n"
    )


def test_a_pipe_that_does_not_wait_is_waited_for(tmp_path: Path) -> None:
    """Another process may have made it non-blocking; its reader is slow, and gets all."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(reader, encoding="utf-8") as read:
        # More than a pipe holds: the help of each command.
        command = [*in_subprocess("train", "--help")]
        with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE) as process:
            os.close(writer)
            text = read.read()
    assert process.returncode == 0
    assert text.count("--steps") == 1
