"""`cda runs`: the table of runs, on a terminal and in a pipe, and its JSON."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cda_cli.config import resolve
from cda_cli.runs.folder import Run
from cda_cli.runs.records import CheckpointRecord
from cda_cli.storage import publish
from tests.commands.helpers import Cda, assert_refused
from tests.runs.records import TRAIN, VALIDATION


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run with a falling loss, one that was cut short, and a folder that holds something else."""
    tensors = {"weight": torch.zeros(4)}
    for name, steps, k in (("finished", 40, 2.0), ("cut", 20, 8.0)):
        run = Run(tmp_path / "runs" / name)
        run.path.mkdir(parents=True)
        run.write_config(resolve("tiny", flags={"optim.steps": 40, "model.attn_k": k}))
        metrics = run.open_metrics(0)
        for step in range(10, steps + 1, 10):
            metrics.write(replace(TRAIN, step=step, loss=50.0 / step))
            metrics.write(replace(VALIDATION, step=step, loss=60.0 / step))
        metrics.write(CheckpointRecord(step=steps, path="x"))
        metrics.close()
        publish(run.path, step=steps, model=tensors, optimizer={}, rng={}, state={"step": steps})
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "runs" / "other" / "config.yaml").write_text("title: a site\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_the_table(cda: Cda, runs: Path) -> None:
    """Best first; the paths are such as another command takes."""
    result = cda("runs")
    assert (result.code, result.err) == (0, "")
    assert result.out == (
        "run            state        steps    best  at   train  loss\n"
        "runs/finished  finished     40/40  1.5000  40  1.2500  █▃▁▁\n"
        "  model.attn_k=2\n"
        "runs/cut       interrupted  20/40  3.0000  20  2.5000  █▁\n"
        "  model.attn_k=8\n"
        "runs/other: runs/other/config.yaml: unknown section 'title': known: data, model, optim, run\n"
    )


def test_a_name_longer_than_the_terminal_is_not_cut(
    cda: Cda, runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is there to be copied; the columns stay in their places."""
    name = "runs/" + "sweep-" * 20
    (runs / "cut").rename(tmp_path / name)
    lines = cda("runs").out.splitlines()
    place = lines.index(name)
    assert lines[place + 1].index("interrupted") == lines[0].index("state")
    assert max(map(len, (line for line in lines if line != name))) <= 120


def test_one_run_differs_from_none(cda: Cda, runs: Path) -> None:
    assert "attn_k" not in cda("runs", runs / "cut").out


def test_runs_of_two_presets_name_them(cda: Cda, runs: Path) -> None:
    Run(runs / "cut").write_config(resolve("tiny", flags={"optim.steps": 40}).model_copy(update={"preset": "base"}))
    out = cda("runs").out
    assert "  preset=tiny" in out
    assert "  preset=base" in out


def test_what_is_damaged_or_gone_is_said_below_its_run(cda: Cda, runs: Path) -> None:
    """A table that lists it as finished would promise a model that is not there."""
    shutil.rmtree(runs / "finished" / "checkpoints")
    weights = runs / "cut" / "checkpoints" / "step-00000020" / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-1])
    with (runs / "cut" / "metrics.jsonl").open("r+b") as file:
        file.write(bytes(10))
    lines = cda("runs").out.splitlines()
    below = lines[lines.index(next(line for line in lines if line.startswith("runs/cut"))) :]
    assert "  it has no checkpoint; `cda train --out runs/finished` starts it again" in lines[: -len(below)]
    assert any(f"model.safetensors has {size - 1} bytes instead of {size}" in line for line in below)
    assert "  1 line of metrics.jsonl cannot be read; the others are used" in below
    (runs / "cut" / "metrics.jsonl").unlink()
    [_, cut] = json.loads(cda("runs", "--json").out)["runs"]
    assert cut["faults"][-1] == "it has no metrics.jsonl, so its losses are not known"


def test_json(cda: Cda, runs: Path) -> None:
    result = cda("runs", "--json")
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    best, cut = document["runs"]
    assert document["differing"] == ["model.attn_k"]
    assert list(document["problems"]) == ["runs/other"]
    assert (best["path"], cut["path"]) == ("runs/finished", "runs/cut")
    assert cut | {"settings": None} == {
        "path": "runs/cut", "state": "interrupted", "step": 20, "steps": 40, "best_loss": 3.0, "best_step": 20,
        "train_loss": 2.5, "losses": [5.0, 2.5], "settings": None, "faults": [],
    }  # fmt: skip
    assert cut["settings"]["model.attn_k"] == 8.0


def test_no_runs(cda: Cda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(cda("runs"), "there is no folder runs")
    (tmp_path / "runs").mkdir()
    assert cda("runs") == (0, "no runs\n", "")
    assert json.loads(cda("runs", "--json").out)["runs"] == []
