"""`cda sweep`: its runs as processes, which are stopped, held by others, and go on."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest

from cda_cli.console import SweepDisplay
from cda_cli.storage import only_writer
from cda_cli.sweep import attempts
from cda_cli.sweep.attempts import Attempt
from cda_cli.sweep.files import read_spec
from cda_cli.sweep.jobs import Running, make_slots
from cda_cli.sweep.plan import Sweep
from cda_cli.sweep.run import run_sweep
from cda_cli.sweep.work import Job
from tests.commands.helpers import Cda, assert_refused, steps_saved
from tests.commands.sweeps import FILE, ROOT
from tests.comparison.runs import write_run

MEASURED = ("seconds", "tokens_per_second", "memory_bytes")  # no two runs are equal in these

# In the process of a run, asks the sweep to stop when the checkpoint of step 2 is written, and goes on once the run is
# asked too, so that it is cut in the midst.
STOP_AT_STEP_2 = """
import os, signal, sys
def hook(event, arguments):
    if event == "open" and "step-00000002" in str(arguments[0]) and not done:
        done.append(True)
        seen, arrived = os.pipe()
        os.set_blocking(arrived, False)
        signal.set_wakeup_fd(arrived)  # any thread may be the one that gets the signal
        os.kill(os.getppid(), signal.SIGINT)
        os.read(seen, 1)
done = []
sys.addaudithook(hook)
"""

# The first process of the run `large` ends at once, as if another had the memory.
WITHOUT_MEMORY = """
import os, pathlib, sys
tried = pathlib.Path("tried")
if any("large" in word for word in sys.orig_argv) and not tried.exists():
    tried.touch()
    print("error: the memory is used up; use a smaller --batch-size", file=sys.stderr, flush=True)
    os._exit(1)
"""


def test_a_sweep_that_was_stopped_and_goes_on_gives_the_tables_of_one_that_was_not(
    cda: Cda, tiny: Path, finished: Path, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.write_text(f"{tiny.read_text()}arms: {{only: }}\nseeds: [0]\n")
    shutil.copytree(finished, "uncut/only/seed-0")
    hook = sweep.parent / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(STOP_AT_STEP_2)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{hook}:{ROOT}")
        stopped = cda("sweep", sweep, "--devices", "cpu", "--out", "cut")
    assert stopped.code == 130, stopped.err
    assert stopped.err.endswith("the same command goes on\n")
    shown = cda("sweep", sweep, "--out", "cut", "--no-run")
    assert (shown.code, shown.err) == (0, ""), "to be stopped is no failure"
    assert "1 run has not finished: only seed 0" in shown.out
    assert steps_saved(Path("cut/only/seed-0")) == [2], "the run was not cut in the midst"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    again = ("sweep", sweep, "--devices", "cpu", "--json", "--out")
    resumed, uncut = (json.loads(cda(*again, out).out) for out in ("cut", "uncut"))
    assert metrics(resumed) == metrics(uncut)
    assert [(each.exit_code, each.error) for each in attempts.read(Path("cut"))] == [(143, ""), (0, "")]


class Overtaking(subprocess.Popen[bytes]):
    """A process that has ended before its parent goes on, unless it has more to do than to say what it lacks."""

    def __init__(self, command: object, **options: Any) -> None:
        super().__init__(command, **options)
        if "large" in str(command) and not Path("tried").exists():
            self.wait()


def test_a_run_that_lacked_memory_beside_others_is_tried_again_by_itself(
    cda: Cda, tiny: Path, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", Overtaking)
    sweep.write_text(f"{tiny.read_text()}arms: {{small: , large: }}\nseeds: [0]\n")
    Path("hook").mkdir()
    Path("hook/sitecustomize.py").write_text(WITHOUT_MEMORY)
    monkeypatch.setenv("PYTHONPATH", f"{Path('hook').absolute()}:{ROOT}")
    done = cda("sweep", sweep, "--jobs", "2", "--out", "out")
    assert (done.code, Path("tried").exists()) == (0, True), done.err
    ended = [(each.job, each.exit_code) for each in attempts.read(Path("out"))]
    assert ended == [("large, seed 0", 1), ("small, seed 0", 0), ("large, seed 0", 0)]


def metrics(document: dict[str, Any]) -> dict[str, float]:
    """Those of the only run that no clock measures."""
    [run] = document["arms"][0]["runs"]
    assert run["state"] == "finished"
    return {name: value for name, value in run["metrics"].items() if name not in MEASURED}


class Broken:
    """A display that cannot draw, as on a terminal that is gone."""

    def __init__(self) -> None:
        self.running: list[Running] = []

    def started(self, running: Running) -> None:
        self.running.append(running)
        raise BrokenPipeError

    def ended(self, attempt: Attempt, running: Running) -> None: ...

    def refresh(self, running: Sequence[Running], waiting: int, held: Sequence[Job], *, stopping: bool) -> None: ...


def test_an_error_of_the_sweep_leaves_no_process_behind(sweep: Path) -> None:
    planned, display = Sweep(read_spec(sweep), sweep, sweep.parent / "out"), Broken()
    with pytest.raises(BrokenPipeError):
        run_sweep(planned, make_slots(1, None), display)
    [running] = display.running
    assert running.process.wait() in (-SIGTERM, 128 + SIGTERM)


class Release(Broken):
    """A display on which the runs that other processes hold end, once the sweep waits for them alone."""

    def __init__(self, *locks: AbstractContextManager[None]) -> None:
        super().__init__()
        self.locks, self.shown = locks, SweepDisplay()

    def refresh(self, running: Sequence[Running], waiting: int, held: Sequence[Job], *, stopping: bool) -> None:
        self.shown.refresh(running, waiting, held, stopping=stopping)
        if held and not running:
            for lock in self.locks:
                lock.__exit__(None, None, None)


def hold(folder: Path, **flags: object) -> AbstractContextManager[None]:
    """Makes a run with these flags that has finished but for its process, which goes on until the lock is given up."""
    write_run(folder, [8.0, 6.0, 5.0, 4.0], flags={f"run.{key}": value for key, value in flags.items()}, text={})
    lock = only_writer(folder, lambda _: None)
    lock.__enter__()
    return lock


def test_a_run_that_has_outlived_its_sweep_takes_the_only_place(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that is of a later stage, as where a run of an earlier one failed."""
    sweep.write_text(FILE.replace("[0, 1, 2]", "[0, 1]") + "drop: {margin: 9, seeds: 1}\n")
    out = sweep.parent / "runs" / "sweep"
    write_run(out / "plain" / "seed-0", [8.0, 6.0, 5.0, 4.0], text={})
    display = Release(hold(out / "plain" / "seed-1"))
    with pytest.raises(BrokenPipeError):
        run_sweep(Sweep(read_spec(sweep), sweep, out), make_slots(1, None), display)
    said = capsys.readouterr().err
    assert said == "plain, seed 1: still running since an earlier sweep\n", "a run began beside it"
    assert [running.job.name for running in display.running] == ["sparse, seed 0"]


@pytest.mark.parametrize(("held", "free"), [("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"), ("auto", "cuda:1")])
def test_a_run_that_has_outlived_its_sweep_takes_a_place_on_its_device(sweep: Path, held: str, free: str) -> None:
    out = sweep.parent / "runs" / "sweep"
    display = Release(hold(out / "plain" / "seed-0", device=held))
    with pytest.raises(BrokenPipeError):
        run_sweep(Sweep(read_spec(sweep), sweep, out), make_slots(None, "cuda:0,cuda:1"), display)
    assert [(running.job.name, running.device) for running in display.running] == [("sparse, seed 0", free)]


def test_a_run_that_has_outlived_its_sweep_is_waited_for(cda: Cda, sweep: Path) -> None:
    sweep.write_text(FILE.replace("[0, 1, 2]", "[0]"))
    out = sweep.parent / "runs" / "sweep"
    write_run(out / "sparse" / "seed-0", [8.0, 6.0, 5.0, 4.0], text={})
    lock = hold(out / "plain" / "seed-0")
    run_sweep(Sweep(read_spec(sweep), sweep, out), make_slots(1, None), Release(lock))
    assert "2 runs have no recorded attempt" in cda("sweep", sweep).out


class Finish(Broken):
    """A display on which the process of the first run ends, and leaves a run that has finished.

    It breaks the sweep once that starts another process, and where it waits for one that is not its own.
    """

    idle = 0

    def started(self, running: Running) -> None:
        if self.running:
            super().started(running)
        self.running.append(running)
        running.process.terminate()
        write_run(running.job.folder, [8.0, 6.0, 5.0, 4.0], text={})

    def refresh(self, running: Sequence[Running], waiting: int, held: Sequence[Job], *, stopping: bool) -> None:
        self.idle = not running and self.idle + 1
        if held and self.idle > 1:  # What the end of a process has made ready begins at the next look.
            raise BrokenPipeError


def test_an_evaluation_waits_for_its_own_run_alone(sweep: Path) -> None:
    """It does not wait for a run that belongs to the same stage and that another process holds."""
    sweep.write_text(f"{FILE.replace('[0, 1, 2]', '[0]')}eval: {{max_batches: 3}}\n")
    out, display = sweep.parent / "runs" / "sweep", Finish()
    with pytest.raises(BrokenPipeError), only_writer(out / "sparse" / "seed-0", lambda _: None):
        run_sweep(Sweep(read_spec(sweep), sweep, out), make_slots(2, None), display)
    assert [running.job.name for running in display.running] == ["plain, seed 0", "plain, seed 0, evaluation"]


def test_a_folder_of_something_else_is_refused(cda: Cda, sweep: Path, trained: Path) -> None:
    """Its runs would lie among others, and the hours of the result would be those of both."""
    run = trained / "plain" / "seed-0"
    names = sorted(path.name for path in run.iterdir())
    assert_refused(cda("sweep", sweep, "--out", run), "is the folder of a run; choose another --out")
    sweep.write_text(FILE.replace("plain:", "dense:").replace("sparse:", "few:"))
    assert_refused(cda("sweep", sweep), "has the runs of another sweep (plain, sparse); choose another --out")
    assert sorted(path.name for path in run.iterdir()) == names
    sweep.write_text(FILE.replace("plain:", "dense:"))
    hours = json.loads(cda("sweep", sweep, "--no-run", "--json").out)["hours"]
    assert hours == 1.5, "those of an arm that is no longer in the file are counted"


def test_a_run_that_began_with_other_settings_is_refused(cda: Cda, sweep: Path, trained: Path) -> None:
    """A table that mixed them would be of neither file."""
    Sweep(read_spec(sweep), sweep, trained).jobs()[0].prepare()
    assert cda("sweep", sweep, "--no-run").code == 1
    sweep.write_text(f"{FILE}run: {{log_every: 5}}\n")
    assert cda("sweep", sweep, "--no-run").code == 1, "how often it logs changes no loss"
    sweep.write_text(FILE.replace("{steps: 40}", "{steps: 40, lr: 0.5}"))
    assert_refused(cda("sweep", sweep), "optim.lr 0.003", "now has 0.5", "another --out")
    shutil.rmtree(trained / "plain" / "seed-0")
    assert cda("sweep", sweep, "--no-run").code == 1, "a run is refused of which nothing is there"
