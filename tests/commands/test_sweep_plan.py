"""Which runs the file of a sweep takes, once some have ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cda_cli.config import resolve
from cda_cli.sweep import attempts
from cda_cli.sweep.files import read_spec
from cda_cli.sweep.plan import Sweep
from tests.commands.helpers import Cda, assert_refused
from tests.commands.sweeps import FILE, attempt
from tests.comparison.runs import write_run


@pytest.fixture
def tuned(sweep: Path) -> Path:
    """The folder of a sweep whose arms are tuned, but for a run that failed."""
    sweep.write_text(f"{FILE}tune: {{seed: 9, steps: 3, grid: {{optim.lr: [1e-3, 1e-2, 1e-1]}}}}\n")
    out = sweep.parent / "runs" / "sweep"
    for arm, losses in {"plain": (3.0, 2.0, 2.5), "sparse": (2.0, 2.2, None)}.items():
        for rate, loss in zip(("1e-3", "1e-2", "1e-1"), losses, strict=True):
            if loss is not None:
                write_run(out / arm / "tune" / f"optim.lr={rate}", [8.0, 6.0, 5.0, loss], text={})
            attempts.append(out, attempt(f"{arm}, optim.lr={rate}", "" if loss else "it burst"))
    return out


def test_each_arm_goes_on_with_what_its_tuning_chose(cda: Cda, sweep: Path, tuned: Path) -> None:
    planned = Sweep(read_spec(sweep), sweep, tuned)
    tuning, jobs = planned.tuning_jobs(), planned.jobs()
    assert {(job.config.run.seed, job.config.optim.steps) for job in tuning} == {(9, 3)}
    assert {job.config.optim.steps for job in jobs} == {40}
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
        "These runs had 3 of 40 steps, but for forks: what is best then need not be so at the end.",
    ):
        assert line in lines, f"{line!r} is not in:\n{done.out}"
    assert "plain came out" not in done.out


def test_none_is_chosen_before_all_of_its_tuning_has_ended(cda: Cda, sweep: Path, tuned: Path) -> None:
    attempts.append(tuned, attempt("plain, optim.lr=1e-2"))
    shutil.rmtree(tuned / "plain" / "tune" / "optim.lr=1e-2")
    planned = Sweep(read_spec(sweep), sweep, tuned)
    assert planned.chosen("plain") is None
    assert {job.name.partition(",")[0] for job in planned.jobs()} == {"sparse"}
    done = cda("sweep", sweep, "--no-run").out
    assert [line.split(",")[0] for line in done.splitlines() if line.endswith("chosen")] == ["sparse"]
    assert "sparse came out with the smallest" in done
    assert "plain came out" not in done, "the largest that has finished is called the end of the grid"


def test_a_grid_that_lacks_what_an_arm_has_gone_on_with_is_refused(cda: Cda, sweep: Path, tuned: Path) -> None:
    for job in Sweep(read_spec(sweep), sweep, tuned).jobs():
        write_run(job.folder, text={})
        job.prepare()
    sweep.write_text(sweep.read_text().replace("[1e-3, 1e-2, 1e-1]", "[0.2, 0.3]"))
    assert_refused(cda("sweep", sweep, "--no-run"), "began with optim.lr 0.01, and the file now has 0.2")


@pytest.mark.parametrize(
    ("steps", "grid", "named"),
    [
        (40, "optim.lr: [1e-3]", ["plain, optim.lr=1e-3", "plain, seed 0"]),
        (100, "optim.lr: [1e-3]", ["plain, optim.lr=1e-3"]),
        (100, "optim.warmup_steps: [2, 3]", []),
    ],
)
def test_runs_that_end_in_their_warm_up_are_told(sweep: Path, steps: int, grid: str, named: list[str]) -> None:
    tune = f"tune: {{seed: 9, steps: 3, grid: {{{grid}}}}}\n"
    sweep.write_text(f"{FILE.replace('steps: 40', f'steps: {steps}')}{tune}")
    remarks = Sweep(read_spec(sweep), sweep, sweep.parent / "out").remarks()
    assert [remark.partition(":")[0] for remark in remarks] == named


def test_a_failed_tuning_is_tried_again_and_changes_no_arm_that_has_gone_on(cda: Cda, sweep: Path, tuned: Path) -> None:
    """The runs of the arm stay those of one setting, and what it missed is said."""
    planned = Sweep(read_spec(sweep), sweep, tuned)
    planned.jobs()[1].prepare()
    assert [job.name for job in planned.tuning_jobs() if not job.is_done()] == ["sparse, optim.lr=1e-1"]
    write_run(tuned / "sparse" / "tune" / "optim.lr=1e-1", [8.0, 1.0], text={})
    assert {job.config.optim.lr for job in planned.jobs() if job.name.startswith("sparse")} == {1e-3}
    done = " ".join(cda("sweep", sweep, "--no-run").out.split())
    assert "sparse had gone on before optim.lr=1e-1 finished, which came out lower" in done
    assert "plain had gone on" not in done


def test_an_arm_whose_tuning_failed_has_failed(cda: Cda, sweep: Path) -> None:
    sweep.write_text(f"{FILE}tune: {{seed: 9, steps: 3, grid: {{optim.lr: [9]}}}}\n")
    out = sweep.parent / "runs" / "sweep"
    out.mkdir(parents=True)
    for arm in ("plain", "sparse"):
        attempts.append(out, attempt(f"{arm}, optim.lr=9", "it burst"))
    done = cda("sweep", sweep, "--no-run")
    assert done.code == 1
    assert "plain, seed 0, failed: no run of its tuning has finished, and the last one failed: it burst" in done.out


def test_at_equal_time_the_speed_of_an_arm_gives_its_steps(sweep: Path) -> None:
    sweep.write_text(f"{FILE}equal: time\nminutes: 2\n".replace("optim: {steps: 40}", "optim: {batch_size: 4}"))
    out = sweep.parent / "runs" / "sweep"
    planned = Sweep(read_spec(sweep), sweep, out)
    speeds = next(planned.stages())
    assert [job.name for job in speeds] == ["plain, speed", "sparse, speed"]
    assert planned.jobs() == [], "no speed is known yet"
    write_run(out / "plain" / "speed", tokens_per_second=4096.0, text={})
    write_run(out / "sparse" / "speed", tokens_per_second=1024.0, text={})
    tokens = {job.name: job.config.optim.steps * 4 * job.config.model.seq_len for job in planned.jobs()}
    assert tokens["plain, seed 0"] == 120 * 4096
    assert tokens["sparse, seed 2"] == 120 * 1024


def test_an_arm_that_is_far_worse_after_the_first_seeds_is_dropped_and_named(cda: Cda, sweep: Path) -> None:
    sweep.write_text(FILE.replace("sparse:", "sparse:\n  near:") + "drop: {margin: 0.1, seeds: 2}\n")
    out = sweep.parent / "runs" / "sweep"
    planned = Sweep(read_spec(sweep), sweep, out)
    for arm, losses in {"plain": (4.0, 4.2), "sparse": (4.25, 4.1), "near": (4.1, 4.29)}.items():
        assert len(planned.jobs()) == 9, "an arm was dropped before its first seeds have ended"
        for seed, loss in enumerate(losses):
            write_run(out / arm / f"seed-{seed}", [8.0, 6.0, 5.0, loss], text={})
    missing = ["plain, seed 2", "sparse, seed 2", "near, seed 2"]
    assert [job.name for job in planned.jobs() if not job.is_done()] == missing
    sweep.write_text(sweep.read_text().replace("margin: 0.1", "margin: 0.09"))
    planned = Sweep(read_spec(sweep), sweep, out)
    assert [job.name for job in planned.jobs() if not job.is_done()] == missing[:2]
    done = " ".join(cda("sweep", sweep, "--no-run").out.split())
    assert "near was dropped: after 2 seeds it was worse than plain by 0.0950" in done
    sweep.write_text(f"{sweep.read_text()}compare: {{arm: near, control: sparse, claim: superior, margin: 1}}\n")
    jobs = Sweep(read_spec(sweep), sweep, out).jobs()
    assert [job.name for job in jobs if not job.is_done()] == missing, "a claim lost seeds to a comparison not its own"


def test_a_fork_that_goes_on_in_a_renamed_folder_names_its_trunk_as_at_first(sweep: Path) -> None:
    """Training compares the names, and the trunk is the same wherever it lies."""
    sweep.write_text(FILE.replace("sparse:", "sparse: {from: trunk}") + "trunks: {trunk: }\n")
    out = sweep.parent / "renamed"
    write_run(out / "trunk" / "seed-0", text={})
    flags = {"run.init_from": "before/trunk/seed-0/checkpoints/step-00000032", "run.fork": True}
    write_run(out / "sparse" / "seed-0", [8.0, 6.0], flags=flags, text={})
    jobs = {job.name: job for job in Sweep(read_spec(sweep), sweep, out).jobs()}
    for name, beginning in {"seed 0": flags["run.init_from"], "seed 1": str(out / "trunk" / "seed-1")}.items():
        job = jobs[f"sparse, {name}"]
        job.prepare()
        assert resolve(file=job.settings_file).run.init_from == beginning


def test_forks_go_on_from_the_trunk_of_their_seed(cda: Cda, sweep: Path) -> None:
    forked = FILE.replace("plain: {", "plain: {from: trunk, ").replace("[0, 1, 2]", "[0, 1]")
    trunk = "trunks: {trunk: {share: 0.75, model: {dim: 64}}}\n"
    sweep.write_text(f"{forked}{trunk}tune: {{seed: 9, steps: 3, grid: {{optim.lr: [1e-3]}}}}\n")
    out = sweep.parent / "runs" / "sweep"
    tuned = Sweep(read_spec(sweep), sweep, out)
    steps = {job.config.run.init_from is not None: job.config.optim.steps for job in tuned.tuning_jobs()}
    assert steps == {True: 40, False: 3}, "a fork is tuned after a trunk that is as long as that of its runs"
    assert {job.config.optim.steps for job in tuned.trunk_jobs()} == {30}
    sweep.write_text(f"{forked}{trunk}")
    planned = Sweep(read_spec(sweep), sweep, out)
    trunks, jobs = planned.trunk_jobs(), planned.jobs()
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


def test_a_claim_may_be_about_averaged_weights(cda: Cda, sweep: Path) -> None:
    sweep.write_text(f"{FILE}compare: [{{arm: sparse, claim: superior, margin: 0.1, metric: best_ema_loss}}]\n")
    for seed in range(3):
        write_run(sweep.parent / "runs" / "sweep" / "plain" / f"seed-{seed}", [8.0, 4.0, 5.0], averaged=0.25, text={})
        write_run(sweep.parent / "runs" / "sweep" / "sparse" / f"seed-{seed}", [8.0, 4.5, 5.0], averaged=1.25, text={})
    assert "Holds: difference -0.5000" in " ".join(cda("sweep", sweep, "--no-run").out.split())
