"""The tables of `cda sweep`: what they say of the runs that are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cda_cli.sweep import attempts
from cda_cli.sweep.claims import register, registration
from cda_cli.sweep.files import read_spec
from cda_cli.sweep.plan import Sweep
from tests.commands.helpers import Cda, assert_refused
from tests.commands.sweeps import FILE, attempt
from tests.comparison.runs import write_run


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


def test_the_blocks_that_routers_choose_have_a_column_where_there_are_routers(
    cda: Cda, sweep: Path, trained: Path
) -> None:
    assert "active units  blocks" not in cda("sweep", sweep, "--no-run").out
    write_run(trained / "sparse" / "seed-2", [8.0, 6.0, 5.0, 4.5], active_blocks=4.5, text={})
    lines = [" ".join(line.split()) for line in cda("sweep", sweep, "--no-run").out.splitlines()]
    assert any(line.startswith("arm tokens time") and line.endswith("active units blocks") for line in lines)
    assert any(line.startswith("sparse ") and line.endswith("75.0% 4.50") for line in lines)
    assert any(line.startswith("plain ") and line.endswith("75.0% –") for line in lines)


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


def test_one_seed_has_no_interval_and_the_result_says_what_would(cda: Cda, sweep: Path, trained: Path) -> None:
    sweep.write_text(FILE.replace("[0, 1, 2]", "[0]").replace("sparse:", "sparse:\n  near:") + CLAIMS)
    lines = cda("sweep", sweep, "--no-run").out.splitlines()
    assert "Differences from plain, the control, are paired by seed." in lines
    assert "One seed gives no interval; give two or more." in lines
    assert lines.count("Not decided: 1 seed has both runs; two or more decide.") == 2
    assert not [line for line in lines if "Student" in line or "level" in line], "an interval is explained"


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
    done = cda("sweep", sweep, "--no-run")
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
    Path("pages").mkdir()
    for name, shown in {"a plot.svg": "![", "plot.pdf": "\n["}.items():
        cda("sweep", sweep, "--no-run", "--plot", name, "--markdown", "pages/page.md")
        link = f"{shown}The losses of all arms and seeds](../{name.replace(' ', '%20')})\n"
        assert link in Path("pages/page.md").read_text()
    drawn = Path("a plot.svg").read_text()
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
        "arm seeds nats/token deviation − control 95 % interval support",
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
