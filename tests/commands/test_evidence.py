"""The experiments of benchmarks/evidence: each can run in both forms, and gives its table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from signal import SIGTERM
from types import ModuleType

import pytest

from cda_cli.signals import StopRequest
from cda_cli.sweep.files import read_spec
from cda_cli.sweep.plan import Sweep
from cda_cli.sweep.run import check_sweep
from tests.commands.helpers import Cda
from tests.commands.sweeps import ROOT

FILES = sorted((ROOT / "benchmarks" / "evidence").glob("*.yaml"))
SMALLEST = {
    "optim.steps": 3, "optim.batch_size": 2, "optim.warmup_steps": 1, "model.depth": 1, "model.dim": 16,
    "model.heads": 1, "run.eval_batches": 1,
}  # fmt: skip


@pytest.mark.parametrize("reduced", [False, True], ids=["full", "reduced"])
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_can_run(file: Path, reduced: bool) -> None:
    """Its arms are equal in what it holds equal, and its claims and tasks are of metrics and lengths that there are."""
    planned = Sweep(read_spec(file, reduced=reduced), file, Path("out"))
    check_sweep(planned)
    wants = planned.spec.eval
    for claim in planned.spec.compare:
        if wants and wants.tasks:
            assert any(f"length={length}" in claim.metric for length in wants.lengths)


def test_the_smallest_form_of_language_modelling_gives_its_table(
    cda: Cda, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, as starting one takes longer than training so little."""
    monkeypatch.chdir(tmp_path)
    file = ROOT / "benchmarks" / "evidence" / "language-modelling.yaml"
    sets = [f"{key}={value}" for key, value in SMALLEST.items()] + [f"data.source={text}", "model.seq_len=32"]
    planned = Sweep(read_spec(file, reduced=True, sets=sets), file, Path("out"))
    trained = ("gated-trunk", "learned-trunk", "tempered-gate", "tempered-gate-hard", "soft-topk-annealed")
    evaluated = {"tempered-gate", "soft-topk-annealed"}
    wanted = {f"{arm}, seed 0" for arm in trained} | {f"{arm}, seed 0, evaluation" for arm in evaluated}
    for job in (job for jobs in planned.stages() for job in jobs if job.name in wanted):
        job.prepare()
        done = cda(*job.arguments("cpu"))
        assert done.code == 0, f"{job.name}: {done.err}"
        job.output.write_text(done.out)
        job.finish()
    options = ["--reduced", "--out", "out", "--no-run", "--json", *(word for line in sets for word in ("--set", line))]
    arms = {arm["name"]: arm["runs"][0] for arm in json.loads(cda("sweep", file, *options).out)["arms"]}
    assert {name for name, run in arms.items() if run["state"] == "finished"} == evaluated
    assert all("eval.top[16].bits_per_byte" in arms[name]["metrics"] for name in evaluated)


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The program, beside which `cda` is what a test writes into `cda_cli/__main__.py` of the working folder."""
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks" / "evidence.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "cda_cli").mkdir()
    (tmp_path / "cda_cli" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return module


def test_a_stop_of_the_experiments_reaches_the_sweep_and_no_other_begins(evidence: ModuleType, tmp_path: Path) -> None:
    # In place of `cda sweep`: it writes that it began, asks for the stop, and goes on until it is stopped itself.
    begins = f"open('began', 'a').write('.'); import os, signal; os.kill({os.getpid()}, {SIGTERM}); signal.pause()"
    Path("cda_cli/__main__.py").write_text(begins)
    asked = argparse.Namespace(names=["length-sort", "length-copy"], out=tmp_path, text=[], full=False, jobs=1)
    with StopRequest() as stop:
        evidence.run_all(asked, [], stop)
    assert stop.signal_number == SIGTERM
    assert Path("began").read_text() == ".", "the next sweep began after the stop"


# In place of `cda sweep`: it refuses an option, and otherwise writes the page of length-sort alone, and fails.
FAILS = """
import pathlib, sys
open("began", "a").write(".")
page = pathlib.Path(sys.argv[sys.argv.index("--markdown") + 1])
if "--textt" in sys.argv:
    sys.exit(2)
if "sort" in page.name:
    page.write_text("new")
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("options", "began", "code", "said"),
    [
        (["--textt", "x"], ".", 2, ""),
        (
            [],
            "..",
            "something failed in length-sort-reduced, length-copy-reduced; the same command tries it again",
            ".",
        ),
        (["--text", "no.txt"], "", 2, "there is no text no.txt"),
        (["--text", "."], "", 2, "--text changes nothing in length-sort, length-copy; leave it out, or name some of"),
    ],
)
def test_the_experiments_name_the_pages_that_they_wrote_and_end_where_one_is_refused(
    evidence: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    began: str,
    code: int | str,
    said: str,
) -> None:
    Path("cda_cli/__main__.py").write_text(FAILS)
    Path("began").touch()
    Path("out").mkdir()
    Path("out/length-copy-reduced.md").write_text("that of an earlier call")
    monkeypatch.setattr(
        "sys.argv", ["evidence.py", "length-sort", "length-copy", "--no-full", "--out", "out", *options]
    )
    with pytest.raises(SystemExit) as ended:
        evidence.main()
    assert (ended.value.code, Path("began").read_text()) == (code, began)
    err = capsys.readouterr().err
    assert said in err
    assert err.count(".md") == err.count("out/length-sort-reduced.md, after") == (began == "..")
