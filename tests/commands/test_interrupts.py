"""SIGINT, SIGTERM and SIGHUP: the step in hand is finished and saved, and the same command goes on from there.

No test waits for a moment: a signal is sent when a certain line was read, or by the process itself at a certain file.
"""

from __future__ import annotations

import functools
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cda_cli.errors import InterruptedRunError
from cda_cli.signals import StopRequest
from tests.commands.forked import popen_forked, run_forked, signal_at
from tests.commands.helpers import Cda, contents, metrics, steps_saved

BEFORE_THE_START = "stopped before the first step, with nothing to save; the same command starts again\n"
# Sends itself SIGTERM when it imports torch, which what is forked has done already.
AT_TORCH = """
import signal
from tests.commands.forked import signal_at
signal_at(signal.SIGTERM, "import", "torch")
from cda_cli.main import run
run()
"""


def test_a_run_that_is_stopped_saves_and_goes_on(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """No step that was said to be done is lost, and none is done twice; the exit code tells what happened.

    The experiment `signals` of tests/reliability sends SIGTERM and SIGHUP too.
    """
    run = tmp_path / "run"
    settings = ("train", "--config", tiny, "--out", run, "--steps", 1_000_000, "--save-every", 0, "--eval-every", 0)
    with popen_forked(*settings) as process:
        lines = iter(process.stdout.readline, "")
        said = [next(line for line in lines if line.lstrip().startswith("3/"))]
        os.kill(process.pid, signal.SIGINT)
        said += [line for line in lines if "/1000000  loss" in line]
        error = process.stderr.read()
        assert process.returncode == 130, error
    last = int(said[-1].split("/")[0])
    assert steps_saved(run) == [last], "the newest checkpoint is not that of the last step that was said"
    assert error == f"stopped at step {last} of 1000000, and saved; `cda train --out {run}` goes on from there\n"
    assert [record["step"] for record in metrics(run, "train")] == list(range(1, last + 1))
    result = cda(*settings[:-6], "--steps", last + 2, "--set", "optim.schedule_steps=1000000")
    assert result.code == 0, result.err
    assert f"resuming from {run}/checkpoints/step-{last:08}, step {last}" in result.out
    assert [record["step"] for record in metrics(run, "train")] == list(range(1, last + 3))


def test_a_stop_before_the_first_step_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    """No run folder, and no half of the tokens in the cache, which a later run would take for whole."""
    first = functools.partial(signal_at, signal.SIGINT, "open", "train.bin")
    done = run_forked("train", "--config", tiny, "--out", tmp_path / "run", first=first)
    assert (done.code, done.err) == (130, BEFORE_THE_START)
    assert not (tmp_path / "run").exists()
    assert contents(tmp_path / "cache") == {"tokens": None}


def test_a_run_that_stands_still_says_where(tiny: Path, tmp_path: Path) -> None:
    """By SIGQUIT, which is Ctrl-\\: a stop would wait for what never ends."""
    done = run_forked("train", "--config", tiny, "--out", tmp_path / "run", first=quit_without_core)
    assert done.code == -signal.SIGQUIT
    first, *places = done.err.splitlines()
    assert first.endswith("(most recent call first):")
    assert any("/cda_cli/data/" in place for place in places), "the stack of the thread that stands still is not shown"


def quit_without_core() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal_at(signal.SIGQUIT, "open", "train.bin")


def test_a_stop_while_pytorch_is_imported_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    done = stopped_at_torch("train", "--config", str(tiny), "--out", str(tmp_path / "run"))
    assert (done.returncode, done.stderr) == (143, BEFORE_THE_START)
    assert not (tmp_path / "run").exists()
    assert contents(tmp_path / "cache") == {}


def stopped_at_torch(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AT_TORCH, *args]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)


def test_a_stop_during_an_export_leaves_nothing(finished: Path, tmp_path: Path) -> None:
    """The folder is begun under a hidden name, which a process that dies would leave behind."""
    before = contents(tmp_path)
    first = functools.partial(signal_at, signal.SIGTERM, "open", "generation_config.json")
    done = run_forked("export", finished, tmp_path / "model", first=first)
    assert (done.code, done.err) == (143, "interrupted; nothing was written\n")
    assert contents(tmp_path) == before


def test_requests_are_noted_and_handlers_given_back() -> None:
    """A handler that stays would swallow Ctrl-C in whatever comes after the command."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest() as stop:
        assert not stop
        stop.check()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop
        with pytest.raises(InterruptedRunError, match="why") as caught:
            stop.check("why")
    assert caught.value.exit_code == 143, "the first signal counts"
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_first_request_is_answered_and_no_other() -> None:
    """Work that ends at once has its own last word."""
    answers = []
    with pytest.raises(InterruptedRunError, match="nothing to save"), StopRequest() as stop:  # noqa: PT012
        stop.answer = lambda: answers.append("stopping")
        signal.raise_signal(signal.SIGINT)
        assert answers == ["stopping"]
        signal.raise_signal(signal.SIGTERM)
        with stop.at_once("nothing to save"):
            pytest.fail("the work was begun")
    assert answers == ["stopping"]
    with pytest.raises(InterruptedRunError), StopRequest() as stop, stop.at_once("nothing to save"):  # noqa: PT012
        stop.answer = lambda: answers.append("again")
        signal.raise_signal(signal.SIGINT)
    assert answers == ["stopping"]


def test_a_hang_up_that_is_ignored_stays_so() -> None:
    """`nohup cda train` is to outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interrupted_run_keeps_its_exit_code_with_debug(tiny: Path, tmp_path: Path) -> None:
    done = stopped_at_torch("--debug", "train", "--config", str(tiny), "--out", str(tmp_path / "run"))
    assert done.returncode == 143, done.stderr
    assert "InterruptedRunError" in done.stderr


def test_handlers_are_given_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), StopRequest():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_work_with_nothing_to_save_ends_at_once(number: signal.Signals) -> None:
    """A download does not come by to ask; what it has begun is cleaned up on the way out."""
    cleaned = []

    def work() -> None:
        try:
            signal.raise_signal(number)
            pytest.fail("the work went on")
        finally:
            cleaned.append(True)

    with pytest.raises(InterruptedRunError, match="nothing to save") as caught:  # noqa: SIM117 - the order matters
        with StopRequest() as stop, stop.at_once("nothing to save"):
            work()
    assert caught.value.exit_code == 128 + number
    assert cleaned == [True]


def test_a_request_from_before_ends_it_too() -> None:
    """And afterwards a request is only noted again."""
    with StopRequest() as stop:
        with stop.at_once("none yet"):
            pass
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(InterruptedRunError, match="asked before"), stop.at_once("asked before"):
            pytest.fail("the work was begun")


def test_items_end_with_the_request() -> None:
    """The item in hand is finished; the next one is not begun."""
    with StopRequest() as stop:
        seen = []
        for item in stop.until(range(9)):
            seen.append(item)
            if item == 2:
                signal.raise_signal(signal.SIGINT)
        assert seen == [0, 1, 2]
        assert list(stop.until(range(9))) == [0], "the first always, so that there is something to report"


def test_a_stop_while_sampling_says_so(finished: Path) -> None:
    """The exit code tells it too."""
    with popen_forked("sample", finished, "--prompt", "a", "--max-new-tokens", 1_000_000) as cda:
        assert cda.stdout.read(1) == "a"
        os.kill(cda.pid, signal.SIGINT)
        cda.stdout.read()
        assert cda.stderr.read() == "interrupted; the last text is not whole\n"
        assert cda.returncode == 130
