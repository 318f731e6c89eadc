"""The file of a sweep: what is wrong in it is told with its place, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cda_cli.sweep.files import read_spec
from cda_cli.sweep.plan import Sweep
from tests.commands.helpers import Cda, assert_refused
from tests.commands.sweeps import FILE, ROOT

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
    "a required key that is misspelt": (FILE.replace("seeds", "sedes"), "unknown key 'sedes': did you mean 'seeds'?"),
    "a key of a claim that is missing": (
        f"{FILE}compare: {{arm: sparse, margin: 1}}",
        "the key 'compare.0.claim' is missing",
    ),
    "no seed": (FILE.replace("[0, 1, 2]", "[0, one]"), "seeds.1 = 'one' is not possible"),
    "no seeds": (FILE.replace("[0, 1, 2]", "[]"), "seeds is empty; give at least one seed"),
    "no arm at all": ("arms: {}\nseeds: [0]", "arms is empty; give at least one arm"),
    "no grid": (f"{FILE}tune: {{seed: 9, grid: {{}}}}", "tune.grid is empty; give at least one setting"),
    "a seed twice": (FILE.replace("[0, 1, 2]", "[0, 0]"), "seeds: a seed is given twice"),
    "no such seed": (FILE.replace("[0, 1, 2]", "[0, -1]"), "sweep.yaml: seeds.1 = '-1' is not possible"),
    "a seed of an arm": (FILE.replace("sparse:", "sparse: {run: {seed: 3}}"), "arms.sparse.run: each run has one of"),
    "a seed that is tuned": (f"{FILE}tune: {{seed: 9, grid: {{run.seed: [1, 2]}}}}", "tune.grid: each run has one of"),
    "a grid without values": (f"{FILE}tune: {{seed: 9, grid: {{optim.lr: []}}}}", "optim.lr has no values"),
    "a value twice": (f"{FILE}tune: {{seed: 9, grid: {{optim.lr: [1, 1]}}}}", "optim.lr has a value twice"),
    "no such control": (f"{FILE}control: plein", "control: there is no arm 'plein': did you mean 'plain'?"),
    "no name of a folder": (FILE.replace("sparse:", "../up:"), "arms: '../up' is no name of a folder"),
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
    "a fork of nothing": (FILE.replace("sparse:", "sparse: {from: trunk}"), "arms.sparse.from: there is no trunk"),
    "a trunk without a fork": (f"{FILE}trunks: {{late: {{share: 0.5}}}}", "trunks.late: no arm begins from it"),
    "a trunk in the folder of an arm": (
        FILE.replace("sparse:", "sparse: {from: plain}") + "trunks: {plain: }",
        "trunks.plain has the name of an arm",
    ),
    "a text of tasks": (f"{FILE}eval: {{tasks: ['task:sort'], cut: ['top:4']}}", "eval: cut is about a text"),
    "lengths of a text": (f"{FILE}eval: {{lengths: [64]}}", "eval: lengths is about tasks; name them"),
    "no such task": (f"{FILE}eval: {{tasks: ['task:sirt']}}", "eval.tasks: "),
    "a drop by no metric": (f"{FILE}drop: {{metric: los}}", "drop.metric: there is no metric 'los' of a run"),
    "a drop after the last seed": (
        f"{FILE}drop: {{seeds: 3}}",
        "drop.seeds: of 3 seeds none is left after the first 3",
    ),
    "a claim of an arm against itself": (
        f"{FILE}compare: [{{arm: sparse, claim: superior, margin: 1}}, {{arm: plain, claim: superior, margin: 1}}]",
        "compare.1: plain is its own control",
    ),
    "itself": ("extends: sweep.yaml", "sweep.yaml extends itself"),
    "no file that it extends": ("extends: other.yaml", "other.yaml, which"),
    "a claim of no metric": (
        f"{FILE}compare: {{arm: sparse, claim: superior, margin: 1, metric: los}}",
        "compare.0.metric: there is no metric 'los' of a run: did you mean 'loss'?",
    ),
    "a claim without a margin": (
        f"{FILE}compare: {{arm: sparse, claim: superior, margin: none}}",
        "compare.0.margin = 'none' is not possible",
    ),
    "a claim of no arm": (
        f"{FILE}compare: {{arm: spars, claim: superior, margin: 1}}",
        "compare.0.arm: there is no arm 'spars': did you mean 'sparse'?",
    ),
    "a wrong key of a claim": (
        f"{FILE}compare: {{arm: sparse, clam: superior, margin: 1}}",
        "unknown key 'compare.0.clam': did you mean 'claim'?",
    ),
    "a wrong cut": (f"{FILE}eval: {{cut: [tip:4]}}", "eval.cut: "),
    "a claim of an evaluation that there is not": (
        f"{FILE}compare: {{arm: sparse, claim: superior, margin: 1, metric: eval.loss}}",
        "which the key eval asks for; add it",
    ),
    "a claim of a cut that is not measured": (
        f"{FILE}eval: {{cut: ['top:4,8,16']}}\ncompare: {{arm: sparse, claim: superior, margin: 1, "
        "metric: loss, of_control: 'eval.top[5].bits_per_byte'}",
        "compare.0.of_control: eval does not measure 'top[5]', of the metric 'eval.top[5].bits_per_byte'; name one of "
        "top[4], top[8], top[16]",
    ),
    "a drop by a cut without cuts": (
        f"{FILE}eval: {{max_batches: 2}}\ndrop: {{metric: 'eval.top[4].bits_per_byte'}}",
        "drop.metric: eval does not measure 'top[4]', of the metric 'eval.top[4].bits_per_byte'; it has no cut",
    ),
    "a claim of a length that is not measured": (
        f"{FILE}eval: {{tasks: ['task:sort'], lengths: [64]}}\ncompare: {{arm: sparse, claim: superior, margin: 1, "
        "metric: 'eval.tasks.task:sort?length=46.metrics.exact_match,none'}",
        "compare.0.metric: eval does not measure 'task:sort?length=46', of the metric",
    ),
    "time without minutes": (f"{FILE}equal: time", "go together"),
    "steps at equal time": (f"{FILE}equal: time\nminutes: 1", "optim: the steps follow from"),
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
        (["--devices", "cpu,cuda:99"], "no device 'cuda:99'"),
        (["--markdown", "no/table.md"], "make no first"),
        (["--plot", "table.txt"], "is no picture"),
        (["--reduced"], "has no reduced form"),
        (["--set", "optim.stps=3"], "unknown setting 'optim.stps'"),
        (["--set", "data.source=no.txt"], "there is no text no.txt"),
    ],
)
def test_wrong_options_are_refused(cda: Cda, sweep: Path, options: list[Any], words: str) -> None:
    sweep.write_text(FILE)
    assert_refused(cda("sweep", sweep, *options), words)
    assert not Path("runs").exists()


def test_runs_at_equal_time_do_not_share_a_device(cda: Cda, sweep: Path) -> None:
    sweep.write_text(FILE.replace("optim: {steps: 40}", "equal: time\nminutes: 1"))
    assert_refused(cda("sweep", sweep, "--jobs", 2), "leave --jobs out")


def test_the_example_of_the_docs_is_a_sweep() -> None:
    file = ROOT / "docs" / "sweep.yaml"
    planned = Sweep(read_spec(file), file, Path("out"))
    planned.check(lambda config: 0)
    assert len(planned.jobs()) == 9


def test_a_file_changes_another_and_its_reduced_form_changes_that(sweep: Path) -> None:
    """So does --set for all arms, above both."""
    (sweep.parent / "whole.yaml").write_text(f"{FILE}reduced: {{optim: {{steps: 20}}, seeds: [0]}}\n")
    sweep.write_text("extends: whole.yaml\noptim: {lr: 0.5}\narms: {sparse: {model: {attn_k: 4}}}\n")
    whole, small = read_spec(sweep), read_spec(sweep, reduced=True, sets=["optim.lr=0.25"])
    assert (whole.optim, whole.seeds) == ({"steps": "40", "lr": "0.5"}, [0, 1, 2])
    assert (small.optim, small.seeds) == ({"steps": "20", "lr": "0.25"}, [0])
    assert small.arms["sparse"].model == {"attn_k": "4"}
    assert small.arms["plain"].model == {"attention": "softmax"}
