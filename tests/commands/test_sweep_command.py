"""`cda sweep`: its file, its runs as processes, and its tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cda_cli.sweep import attempts
from cda_cli.sweep.attempts import Attempt
from cda_cli.sweep.claims import Decision, register, registration
from cda_cli.sweep.plan import Sweep
from cda_cli.sweep.spec import Claim, read_spec
from cda_cli.sweep.student_t import Mean
from tests.commands.helpers import Cda, assert_refused, steps_saved
from tests.comparison.runs import write_run

ROOT = Path(__file__).parent.parent.parent

FILE = """\
optim: {steps: 40}
arms:
  plain: {model: {attention: softmax}}
  sparse:
seeds: [0, 1, 2]
"""
MEASURED = ("seconds", "tokens_per_second", "memory_bytes")  # no two runs are equal in these

# In the process of a run, asks the sweep to stop when the checkpoint of step 2 is written, and goes on once the run is
# asked too, so that it is cut in the midst.
STOP_AT_STEP_2 = """
import os, signal, sys
def hook(event, arguments):
    if event == "open" and "step-00000002" in str(arguments[0]) and not done:
        done.append(True)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        os.kill(os.getppid(), signal.SIGINT)
        signal.sigwait([signal.SIGTERM])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        signal.raise_signal(signal.SIGTERM)
done = []
sys.addaudithook(hook)
"""


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a sweep in the working folder."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sweep.yaml"
    file.write_text(FILE)
    return file


def attempt(job: str, error: str = "") -> Attempt:
    return Attempt(
        job=job, command="cda train", began="2020-02-02T02:02:02+00:00", seconds=1800.0, exit_code=int(bool(error)),
        error=error, machine="a computer", device="cpu", version="1", commit="abc",
    )  # fmt: skip


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
        stopped = cda("sweep", sweep, "--out", "cut")
    assert stopped.code == 130, stopped.err
    assert stopped.err.endswith("the same command goes on\n")
    assert steps_saved(Path("cut/only/seed-0")) == [2], "the run was not cut in the midst"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    resumed, uncut = (json.loads(cda("sweep", sweep, "--out", out, "--json").out) for out in ("cut", "uncut"))
    assert figures(resumed) == figures(uncut)
    assert [each.exit_code for each in attempts.read(Path("cut"))] == [143, 0]


def figures(document: dict[str, Any]) -> dict[str, float]:
    """Those of the only run that no clock measures."""
    [run] = document["arms"][0]["runs"]
    assert run["state"] == "finished"
    return {name: value for name, value in run["figures"].items() if name not in MEASURED}


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


def test_what_did_not_run_yet_is_no_failure(cda: Cda, sweep: Path, trained: Path) -> None:
    sweep.write_text(FILE.replace("[0, 1, 2]", "[0, 1, 7]"))
    done = cda("sweep", sweep, "--no-run")
    assert (done.code, done.err) == (0, "")
    assert "2 runs have not finished: plain seed 7, sparse seed 7" in done.out


def test_a_run_that_began_with_other_settings_is_refused(cda: Cda, sweep: Path, trained: Path) -> None:
    """A table that mixed them would be of neither file."""
    Sweep(read_spec(sweep), sweep, trained).jobs()[0].prepare()
    assert cda("sweep", sweep, "--no-run").code == 1
    sweep.write_text(f"{FILE}run: {{log_every: 5}}\n")
    assert cda("sweep", sweep, "--no-run").code == 1, "how often it logs changes no loss"
    sweep.write_text(FILE.replace("{steps: 40}", "{steps: 40, lr: 0.5}"))
    assert_refused(cda("sweep", sweep), "optim.lr 0.003", "now has 0.5", "another --out")


@pytest.fixture
def tuned(sweep: Path) -> Path:
    """The folder of a sweep whose arms are tuned, but for a run that failed."""
    sweep.write_text(f"{FILE}tune: {{seed: 9, grid: {{optim.lr: [1e-3, 1e-2, 1e-1]}}}}\n")
    out = sweep.parent / "runs" / "sweep"
    for arm, losses in {"plain": (3.0, 2.0, 2.5), "sparse": (2.0, 2.2, None)}.items():
        for rate, loss in zip(("1e-3", "1e-2", "1e-1"), losses, strict=True):
            if loss is not None:
                write_run(out / arm / "tune" / f"optim.lr={rate}", [8.0, 6.0, 5.0, loss], text={})
            attempts.append(out, attempt(f"{arm}, optim.lr={rate}", "" if loss else "it burst"))
    return out


def test_each_arm_goes_on_with_what_its_tuning_chose(cda: Cda, sweep: Path, tuned: Path) -> None:
    planned = Sweep(read_spec(sweep), sweep, tuned)
    _, tuning, jobs = planned.stages()
    assert {job.config.run.seed for job in tuning} == {9}
    assert [job.config.optim.lr for job in tuning] == [1e-3, 1e-2, 1e-1] * 2
    assert {job.name.partition(",")[0]: job.config.optim.lr for job in jobs} == {"plain": 1e-2, "sparse": 1e-3}
    done = cda("sweep", sweep, "--no-run")
    lines = [" ".join(line.split()) for line in done.out.splitlines()]
    for line in (
        "plain, optim.lr=1e-3 3.0000",
        "plain, optim.lr=1e-2 2.0000 chosen",
        "sparse, optim.lr=1e-1 failed",
        "sparse, optim.lr=1e-1, failed: it burst",
        "sparse came out with the smallest optim.lr of its grid; one beyond it may be better.",
    ):
        assert line in lines, f"{line!r} is not in:\n{done.out}"
    assert "plain came out" not in done.out


def test_a_failed_tuning_is_not_tried_again_once_its_arm_has_gone_on(sweep: Path, tuned: Path) -> None:
    """Its loss might change what was chosen, and with it the runs that there are."""
    planned = Sweep(read_spec(sweep), sweep, tuned)
    planned.jobs()[1].prepare()
    assert {job.name.partition(",")[0] for job in planned.tuning_jobs()} == {"plain"}


def test_an_arm_whose_tuning_failed_has_failed(cda: Cda, sweep: Path) -> None:
    sweep.write_text(f"{FILE}tune: {{seed: 9, grid: {{optim.lr: [9]}}}}\n")
    out = sweep.parent / "runs" / "sweep"
    out.mkdir(parents=True)
    for arm in ("plain", "sparse"):
        attempts.append(out, attempt(f"{arm}, optim.lr=9", "it burst"))
    done = cda("sweep", sweep, "--no-run")
    assert done.code == 1
    assert "plain, seed 0, failed: no run of its tuning has finished, and the last one failed: it burst" in done.out


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
    sweep.write_text(FILE.replace("[0, 1, 2]", "[0, 1, 2, 3]") + CLAIMS)
    assert "The runs began with 3 seeds, and there are 4 now" in cda("sweep", sweep, "--no-run").out
    sweep.write_text(FILE + CLAIMS.replace("0.25", "0.5"))
    register(read_spec(sweep), trained)
    assert "The claims were changed after the runs began" in cda("sweep", sweep, "--no-run").out
    document = json.loads(cda("sweep", sweep, "--no-run", "--json").out)
    assert [claim["verdict"] for claim in document["compare"]] == ["holds", "not decided"]


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        ("non-inferior", -0.2, 0.09, "holds"),
        ("non-inferior", -0.2, 0.11, "not decided"),
        ("non-inferior", 0.11, 0.2, "refuted"),
        ("superior", -0.2, -0.01, "holds"),
        ("superior", -0.2, 0.01, "not decided"),
        ("superior", -0.09, 0.2, "refuted"),
    ],
)
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_the_whole_interval_decides(claim: str, low: float, high: float, verdict: str, better: str) -> None:
    said = Claim.model_validate({"arm": "a", "control": "b", "claim": claim, "margin": 0.1, "better": better})
    ends = (low, high) if better == "lower" else (-high, -low)
    assert Decision(said, Mean(sum(ends) / 2, 0.1, *ends, 3)).verdict == verdict


def test_forks_go_on_from_the_trunk_of_their_seed(cda: Cda, sweep: Path) -> None:
    forked = FILE.replace("plain: {", "plain: {from: trunk, ").replace("[0, 1, 2]", "[0, 1]")
    sweep.write_text(f"{forked}trunk: {{share: 0.75, model: {{dim: 64}}}}\n")
    out = sweep.parent / "runs" / "sweep"
    planned = Sweep(read_spec(sweep), sweep, out)
    trunks, _, jobs = planned.stages()
    assert [(job.config.optim.steps, job.config.optim.schedule_steps) for job in trunks] == [(30, 40)] * 2
    of_plain, of_sparse = jobs[0].config, jobs[1].config
    assert (of_plain.run.init_from, of_plain.run.fork) == (str(out / "trunk" / "seed-0"), True)
    assert (of_plain.model.dim, of_plain.optim.steps) == (64, 40)
    assert (of_sparse.run.init_from, of_sparse.run.fork, of_sparse.model.dim) == (None, False, 128)
    write_run(out / "trunk" / "seed-0", [8.0, 6.0, 5.0], text={})
    attempts.append(out, attempt("trunk, seed 1", "it burst"))
    assert [job.is_blocked() for job in planned.jobs()] == [False, False, True, False]
    done = cda("sweep", sweep, "--no-run")
    assert "plain, seed 1, failed: its trunk failed: it burst" in done.out
    assert "3 runs have not finished: plain seed 0, sparse seed 0, sparse seed 1" in done.out
    assert done.code == 1


WRONG: dict[str, tuple[str, str]] = {
    "no arms": ("seeds: [0]", "the key 'arms' is missing"),
    "no mapping": ("[1]", "does not hold"),
    "no YAML": ("arms: [", "line 1"),
    "a wrong key": (f"{FILE}contrl: plain", "unknown key 'contrl': did you mean 'control'?"),
    "a wrong key of an arm": (
        FILE.replace("sparse:", "sparse: {modl: {}}"),
        "'arms.sparse.modl': did you mean 'model'?",
    ),
    "a wrong setting": (FILE.replace("steps", "stps"), "sweep.yaml: unknown setting 'optim.stps'"),
    "a wrong setting of an arm": (
        FILE.replace("attention: softmax", "attention: sofmax"),
        "sweep.yaml: arms.plain: model.attention = 'sofmax' is not possible",
    ),
    "no seed": (FILE.replace("[0, 1, 2]", "[0, one]"), "seeds.1 = 'one' is not possible"),
    "a seed twice": (FILE.replace("[0, 1, 2]", "[0, 0]"), "seeds: a seed is given twice"),
    "no such control": (f"{FILE}control: plein", "control: there is no arm 'plein': did you mean 'plain'?"),
    "no name of a folder": (FILE.replace("sparse:", "../up:"), "an arm has the name of a folder"),
    "tuned on a seed of the table": (
        f"{FILE}tune: {{seed: 1, grid: {{optim.lr: [1]}}}}",
        "tune.seed 1 is among the seeds",
    ),
    "an unequal budget of tuning": (
        FILE.replace("sparse:", "sparse: {grid: {optim.lr: [1, 2]}}") + "tune: {seed: 9, grid: {optim.lr: [1]}}",
        "unequal numbers of runs (plain 1, sparse 2)",
    ),
    "a wrong setting of a grid": (
        f"{FILE}tune: {{seed: 9, grid: {{optim.lr: [1e9]}}}}",
        "tune.grid: optim.lr = 1000000000.0 is not possible",
    ),
    "a grid that changes what is equal": (
        f"{FILE}tune: {{seed: 9, grid: {{optim.batch_size: [8, 16]}}}}",
        "arms differ in their tokens",
    ),
    "a fork of nothing": (FILE.replace("sparse:", "sparse: {from: trunk}"), "arms.sparse.from names the trunk"),
    "a trunk without a fork": (f"{FILE}trunk: {{share: 0.5}}", "trunk: no arm begins from it"),
    "a claim of no figure": (
        f"{FILE}compare: {{arm: sparse, claim: superior, margin: 1, metric: los}}",
        "compare.0.metric: there is no figure 'los' of a run: did you mean 'loss'?",
    ),
    "a claim without a margin": (
        f"{FILE}compare: {{arm: sparse, claim: superior, margin: none}}",
        "compare.0.margin = 'none' is not possible",
    ),
    "a claim of no arm": (
        f"{FILE}compare: {{arm: spars, claim: superior, margin: 1}}",
        "compare.arm: there is no arm 'spars': did you mean 'sparse'?",
    ),
    "a wrong key of a claim": (
        f"{FILE}compare: {{arm: sparse, clam: superior, margin: 1}}",
        "the key 'compare.0.claim' is missing",
    ),
    "unequal tokens": (
        FILE.replace("sparse:", "sparse: {optim: {steps: 80}}"),
        "arms differ in their tokens, which are held equal (plain 81,920, sparse 163,840)",
    ),
    "unequal parameters": (
        FILE.replace("sparse:", "sparse: {model: {ff_mult: 2}}") + "equal: parameters",
        "arms differ in their parameters",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_the_file_is_told_with_its_place(cda: Cda, sweep: Path, case: str) -> None:
    content, words = WRONG[case]
    sweep.write_text(content)
    assert_refused(cda("sweep", sweep), words)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--devices", "cuda:0,"], "names no device"),
        (["--devices", "cuda:0,cuda:1", "--jobs", 1], "would leave devices"),
        (["--markdown", "no/table.md"], "make no first"),
    ],
)
def test_wrong_options_are_refused(cda: Cda, sweep: Path, options: list[Any], words: str) -> None:
    assert_refused(cda("sweep", sweep, *options), words)


def test_the_example_of_the_docs_is_a_sweep() -> None:
    file = ROOT / "docs" / "sweep.yaml"
    planned = Sweep(read_spec(file), file, Path("out"))
    planned.check(lambda config: 0)
    assert len(planned.jobs()) == 9
