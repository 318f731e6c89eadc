"""The experiments of benchmarks/evidence: each can run in both forms, and gives its table."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from pathlib import Path
from signal import SIGTERM

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


def test_a_stop_of_the_experiments_reaches_the_sweep_and_no_other_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("evidence", ROOT / "benchmarks" / "evidence.py")
    assert spec
    assert spec.loader
    evidence = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(evidence)
    # In place of `cda sweep`: it writes that it began, asks for the stop, and goes on until it is stopped itself.
    begins = f"open('began', 'a').write('.'); import os, signal; os.kill({os.getpid()}, {SIGTERM}); signal.pause()"
    (tmp_path / "cda_cli").mkdir()
    (tmp_path / "cda_cli" / "__init__.py").touch()
    (tmp_path / "cda_cli" / "__main__.py").write_text(begins)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    asked = argparse.Namespace(names=["length-sort", "length-copy"], out=tmp_path, text=[], full=False, jobs=1)
    with StopRequest() as stop:
        evidence.run_all(asked, [], stop)
    assert stop.signal_number == SIGTERM
    assert Path("began").read_text() == ".", "the next sweep began after the stop"
