"""`cda sweep`: its file, its runs as processes, and its tables."""

from __future__ import annotations

import json
import shutil
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
from cda_cli.sweep.claims import register, registration
from cda_cli.sweep.files import read_spec
from cda_cli.sweep.jobs import Running, make_slots
from cda_cli.sweep.plan import Sweep
from cda_cli.sweep.run import run_sweep
from cda_cli.sweep.work import Job
from tests.commands.helpers import Cda, assert_refused, steps_saved
from tests.commands.sweeps import FILE, ROOT, attempt
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


@pytest.fixture
def trained(sweep: Path) -> Path:
    """The folder of a sweep whose last run failed."""
    out = sweep.parent / "runs" / "sweep"
    bits = {"plain": (4.5, 4.7, 4.3), "sparse": (4.4, 4.55, None)}
    for arm, values in bits.items():
        for seed, value in enumerate(values):
            if value is not None:
                write_run(out / arm / f"seed-{seed}", [8.0, 6.0, 5.0, value], text={})
            attempts.append(out, attempt(f"{arm}, seed {seed}", "" if value else "it burst; use a smaller --lr"))
    return out


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


def test_a_run_that_lacked_memory_beside_others_is_tried_again_by_itself(
    cda: Cda, tiny: Path, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_tables_have_means_and_paired_differences(cda: Cda, sweep: Path, trained: Path) -> None:
    done = cda("sweep", "sweep.yaml", "--no-run", "--markdown", "table.md")
    assert done.code == 1, "a run failed"
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    for line in (
        "plain 3/3 4.5000 0.2000 – – 6.6",
        "sparse 2/3 4.4750 0.1061 -0.1250 -0.4427 … +0.1927 6.6",
        "sparse, seed 2, failed: it burst; use a smaller --lr",
        "hours 3.00",
        "commit abc",
        "date 2020-02-02",
        "versions cda 1",
    ):
        assert line in lines, f"{line!r} is not in:\n{done.out}"
    assert max(len(line) for line in done.out.splitlines() if not line.endswith(".")) <= 80
    page = Path("table.md").read_text()
    assert "| sparse | 2/3 | 4.4750 | 0.1061 | -0.1250 | -0.4427 … +0.1927 | 6.6 |" in page
    assert "- machine: a computer; cpu" in page
    document = json.loads(cda("sweep", sweep, "--no-run", "--json").out)
    assert document["failed"] == 1
    assert document["arms"][1]["differences"]["bits_per_byte"]["mean"] == pytest.approx(-0.125)
    assert document["arms"][1]["runs"][2]["error"] == "it burst; use a smaller --lr"


def test_arms_that_are_validated_on_unequal_text_are_said_to_be(cda: Cda, sweep: Path) -> None:
    words = "a difference is also that of the text"
    assert words not in " ".join(cda("sweep", sweep, "--no-run").out.split())
    sweep.write_text(FILE.replace("sparse:", "sparse: {optim: {batch_size: 16, steps: 20}}"))
    assert words in " ".join(cda("sweep", sweep, "--no-run").out.split())


def test_what_did_not_run_yet_is_no_failure(cda: Cda, sweep: Path, trained: Path) -> None:
    sweep.write_text(FILE.replace("[0, 1, 2]", "[0, 1, 7]"))
    done = cda("sweep", sweep, "--no-run")
    assert (done.code, done.err) == (0, "")
    assert "2 runs have not finished: plain seed 7, sparse seed 7" in done.out


def test_a_run_without_a_validation_is_named(cda: Cda, sweep: Path, trained: Path) -> None:
    """Its file may be damaged. A mean that silently leaves it out would be of other seeds."""
    records = trained / "plain" / "seed-1" / "metrics.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(line for line in lines if '"validation"' not in line))
    done = cda("sweep", sweep, "--no-run")
    assert done.code == 1
    assert "plain, seed 1, failed: runs/sweep/plain/seed-1 has finished, but has no validation" in done.out


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
    assert "2 runs ended while no sweep looked on" in cda("sweep", sweep).out


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


CLAIMS = """compare:
  - {arm: sparse, claim: non-inferior, margin: 0.25}
  - {arm: sparse, claim: superior, margin: 0.05, metric: loss}
"""


def test_claims_are_registered_and_decided(cda: Cda, sweep: Path, trained: Path) -> None:
    write_run(trained / "sparse" / "seed-2", [8.0, 6.0, 5.0, 4.0], text={})
    sweep.write_text(FILE + CLAIMS)
    spec = read_spec(sweep)
    assert registration(spec, trained) == ["No run has begun, so nothing is registered."]
    register(spec, trained)
    done = cda("sweep", sweep, "--no-run")
    for line in (
        "Claim: sparse is worse than plain by less than 0.25 (bits_per_byte; non-inferior).",
        "Holds: difference -0.1833, 95 % interval -0.4419 … +0.0752, over 3 seeds.",
        "By the measured deviation 0.1041 of differences it takes 4 seeds, if they are equal.",
        "Claim: sparse is better than plain, and 0.05 would matter (loss; superior).",
        "Not decided: difference -0.1833, 95 % interval -0.4419 … +0.0752, over 3 seeds.",
        "By the measured deviation 0.1041 of differences it takes 36 seeds, if it is better by 0.05.",
    ):
        assert line in done.out.splitlines(), f"{line!r} is not in:\n{done.out}"
    assert "before the first run." in done.out
    assert "The level of 95 % is that of each of the 2 claims by itself." in done.out
    sweep.write_text(FILE.replace("[0, 1, 2]", "[0, 1, 2, 3]") + CLAIMS)
    assert "The runs began with 3 seeds, and there are 4 now" in cda("sweep", sweep, "--no-run").out
    sweep.write_text(FILE.replace("[0, 1, 2]", "[0, 2, 3]") + CLAIMS)
    assert "Of the registered seeds, 1 is left out now" in cda("sweep", sweep, "--no-run").out
    sweep.write_text(f"{FILE}{CLAIMS}eval: {{max_batches: 3}}\n")
    assert "The claims, the evaluations or the rule of drop were changed" in cda("sweep", sweep, "--no-run").out
    sweep.write_text(FILE + CLAIMS.replace("0.25", "0.5"))
    register(read_spec(sweep), trained)
    assert "were changed after the runs began" in cda("sweep", sweep, "--no-run").out
    document = json.loads(cda("sweep", sweep, "--no-run", "--json").out)
    assert [claim["verdict"] for claim in document["compare"]] == ["holds", "not decided"]


def test_evaluations_give_the_loss_against_the_keys_kept(cda: Cda, sweep: Path, trained: Path) -> None:
    claim = "{arm: sparse, claim: non-inferior, margin: 9, metric: 'eval.top[4].bits_per_byte', of_control: eval.loss}"
    sweep.write_text(f"{FILE}eval: {{cut: ['top:4,8'], max_batches: 2}}\ncompare: {claim}\n")
    planned = Sweep(read_spec(sweep), sweep, trained)
    jobs = {job.name: job for job in planned.evaluations()}
    first = jobs["plain, seed 0, evaluation"]
    words = ["eval", str(first.folder), "--cut", "top:4,8", "--max-batches", "2", "--device", "cuda:1", "--json"]
    assert first.arguments("cuda:1") == words
    for seed in (0, 1):
        for arm, loss in (("plain", 4.0), ("sparse", 4.1)):
            job = jobs[f"{arm}, seed {seed}, evaluation"]
            assert not job.is_done()
            cuts = [{"name": f"top[{keys}]", "bits_per_byte": loss + seed + 1 / keys} for keys in (4, 8)]
            job.output.write_text(json.dumps({"loss": loss + seed, "bits_per_byte": loss + seed, "cuts": cuts}))
            job.finish()
            assert job.is_done()
    attempts.append(trained, attempt("plain, seed 2, evaluation", "no space"))
    done = cda("sweep", sweep, "--no-run", "--plot", "sweep.svg")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    for line in (
        "sparse 2/3 4.6000 0.7071 +0.1000 +0.1000 … +0.1000",
        "arm all 8 4",
        "sparse 4.6000 4.7250 4.8500",
        "+0.1000 +0.2250 +0.3500",
        "Holds so far: difference +0.3500, 95 % interval +0.3500 … +0.3500, over 2 of 3 seeds.",
        "plain, seed 2, failed: its evaluation failed: no space",
    ):
        assert line in lines, f"{line!r} is not in:\n{done.out}"
    assert "plain 3/3 4.5000" in " ".join(done.out.split()), "a run whose evaluation failed has still trained"
    drawn = Path("sweep.svg").read_text()
    assert all(f">{words}<" in drawn for words in ("plain", "sparse", "keys kept (top)"))
    sweep.write_text(sweep.read_text().replace("eval.loss", "eval.los"))
    assert_refused(cda("sweep", sweep, "--no-run"), "no evaluation has the metric 'eval.los': did you mean")
    shutil.rmtree(first.folder)
    first.run.prepare()
    assert not first.is_done(), "the evaluation of a run that was removed stands for the next one"


def test_tasks_are_scored_by_length(cda: Cda, sweep: Path, trained: Path) -> None:
    task = "data: {source: 'task:mqar?length=8..16&vocab=64&density=0.5'}\nreduced: {optim: {steps: 20}}\n"
    sweep.write_text(f"{FILE}{task}eval: {{tasks: ['task:mqar?density=0.5'], lengths: [8, 32], limit: 100}}\n")
    jobs = Sweep(read_spec(sweep), sweep, trained).evaluations()
    words = ["--tasks", "task:mqar?density=0.5", "--lengths", "8,32", "--limit", "100", "--json"]
    assert jobs[0].arguments(None)[2:] == words
    for job, seed in zip(jobs[:4], (0, 0, 1, 1), strict=True):
        right = {8: 1.0, 32: 0.25 + 0.125 * seed + 0.25 * ("sparse" in job.name)}
        shares = {n: {"exact_match,none": share, "token_accuracy,none": 1} for n, share in right.items()}
        tasks = {
            f"task:mqar?length={n}&density=0.5": {"documents": 100, "metrics": metrics} for n, metrics in shares.items()
        }
        job.output.write_text(json.dumps({"tasks": tasks}))
        job.finish()
    records = trained / "plain" / "seed-0" / "metrics.jsonl"
    records.write_text(records.read_text().replace('"loss": 4.5', '"loss": 1.5'))  # and as many bits per byte as before
    done = cda("sweep", sweep, "--no-run", "--plot", "sweep.svg", "--reduced", "--out", trained)
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    for line in (
        "form reduced, by --reduced",
        "data task:mqar, length 8..16, vocab 64, density 0.5, power 0.01",
        "steps 20",
        "Scored: 100 sequences of each length. Trained on: task:mqar, length 8..16, vocab 64, density 0.5, power 0.01.",
        "arm seeds nats/token deviation − plain 95 % interval support",
        "plain 3/3 3.5000 1.7436 – – 6.6",
        "Exact match by length (task:mqar?density=0.5), %",
        "arm 8 32",
        "plain 100.0 31.2",
        "sparse 100.0 56.2",
        "sparse 100.0 100.0",
    ):
        assert line in lines, f"{line!r} is not in:\n{done.out}"
    assert lines[lines.index("sparse 100.0 56.2") + 1] == "+0.0 +25.0"
    drawn = Path("sweep.svg").read_text()
    assert ">length (task:mqar?density=0.5)<" in drawn
    assert ">nats per token of the last validation" in drawn
