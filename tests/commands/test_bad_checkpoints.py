"""Checkpoints that are damaged, or that do not fit: said in one sentence, never run."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cda_cli.storage import load, locate
from cda_cli.storage.checkpoint import publish
from tests.commands.forked import run_forked
from tests.commands.helpers import Cda, assert_refused, contents

FILES = ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"]
READERS = [("eval",), ("sample", "--prompt", "a"), ("inspect-sparsity",)]


@pytest.fixture
def step(tmp_path: Path, finished: Path) -> Path:
    """A copy of the newest checkpoint, which is the only one of its run."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    return tmp_path / "run" / "checkpoints" / "step-00000006"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.02, 0.5, 0.99])
def test_one_flipped_bit(cda: Cda, step: Path, name: str, place: float) -> None:
    """No tensor format notices it: the model would only be a little worse, and nobody would know why."""
    data = bytearray((step / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (step / name).write_bytes(data)
    run, named = step.parent.parent, step.name if name == "manifest.json" else name  # a manifest may blame the others
    before = contents(run)
    for command, *options in READERS:
        refused = cda(command, run, *options)
        assert_refused(refused, named, "no checkpoint of", "copy the run afresh")
        assert "earlier checkpoint" not in refused.err, "there is none"
        assert "((" not in refused.err.replace("))", "(("), "parentheses in parentheses"
    assert_refused(cda("train", "--out", run, "--steps", 8), named, "copy the run afresh", "another --out")
    assert contents(run) == before


@pytest.mark.parametrize(("damage", "word"), [("model: [", "line 1"), ("x", "does not hold")])
def test_a_damaged_config_is_written_anew_by_the_command_that_is_named(
    cda: Cda, step: Path, damage: str, word: str
) -> None:
    """What --config would want is no remedy for a run: its checkpoints have the same settings."""
    run = step.parent.parent
    file, before = run / "config.yaml", cda("config", run, "--json").out
    file.write_text(damage)
    refused = cda("train", "--out", run)
    assert_refused(refused, str(file), word)
    assert "--config" not in refused.err
    command, target = refused.err.split("`")[1].split(" > ")
    file.write_text(cda(*command.split()[1:]).out)
    assert target == str(file)
    assert cda("config", run, "--json").out == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept", [0, 0.5])
def test_a_file_cut_short(cda: Cda, step: Path, name: str, kept: float) -> None:
    """Named outright, too: there is no other checkpoint to fall back to then."""
    data = (step / name).read_bytes()
    (step / name).write_bytes(data[: int(kept * len(data))])
    for command, *options in READERS:
        assert_refused(cda(command, step, *options), name, "use an earlier checkpoint")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing(cda: Cda, step: Path, name: str) -> None:
    (step / name).unlink()
    for command, *options in READERS:
        assert_refused(cda(command, step, *options), name, "is missing")


@pytest.mark.slow
def test_the_older_one_is_read_and_the_damage_said(finished: Path, tmp_path: Path) -> None:
    """Figures of another checkpoint than the newest, without a word, would be taken for the newest's."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "checkpoints" / "step-00000006" / "rng.safetensors").write_bytes(b"")
    done = run_forked("eval", run, "--max-batches", 1)
    assert done.code == 0
    assert "step-00000004" in done.out
    assert "step-00000006/rng.safetensors has 0 bytes" in done.err
    assert done.err.count("\n") == 1


Change = Callable[[dict[str, Any], dict[str, Any]], None]


def wider(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["model"]["dim"] = 64


def without_a_tensor(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    del tensors["norm.weight"]


def with_a_surplus(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["norm.surplus"] = torch.zeros(2)


def in_half(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors["norm.weight"] = tensors["norm.weight"].half()


def unknown_setting(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["model"]["new_in_version_9"] = True


def softmax(config: dict[str, Any], tensors: dict[str, Any]) -> None:
    config["model"]["attention"] = "softmax"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (wider, ["does not fit", "shape"]),
        (without_a_tensor, ["does not fit", "it has no norm.weight"]),
        (with_a_surplus, ["does not fit", "norm.surplus"]),
        (in_half, ["does not fit", "float16", "float32"]),
        (unknown_setting, ["not one of this version of cda", "new_in_version_9", "the version that wrote it"]),
        (softmax, ["does not fit", "to_learned_k"]),
    ],
)
def test_a_configuration_that_does_not_fit(
    cda: Cda, finished: Path, tmp_path: Path, change: Change, words: list[str]
) -> None:
    """Tensors that are forced into another shape, or left out, give a model that nobody trained."""
    whole = load(locate(finished))
    state, tensors = copy.deepcopy(whole.state), dict(whole.model)
    change(state["config"], tensors)
    run, kept = tmp_path / "run", {"optimizer": whole.optimizer, "rng": whole.rng}
    publish(run, step=6, model=tensors, state=state, **kept)
    shutil.copy(finished / "config.yaml", run / "config.yaml")
    for command, *options in READERS:
        assert_refused(cda(command, run, *options), *words)
    if change is not wider and change is not softmax:  # these are refused as another run's settings
        assert_refused(cda("train", "--out", run, "--steps", 8), *words)


def test_a_state_without_a_configuration(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """Such as one that another program wrote in this format."""
    whole = load(locate(finished))
    state = {key: value for key, value in whole.state.items() if key != "config"}
    publish(tmp_path / "run", step=6, model=whole.model, optimizer=whole.optimizer, rng=whole.rng, state=state)
    for command, *options in READERS:
        assert_refused(cda(command, tmp_path / "run", *options), "configuration", "the version that wrote it")
