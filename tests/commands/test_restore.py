"""From a checkpoint to a model that is ready to run; and the machine that it runs on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from cda_cli.config import annealed_eps, parse
from cda_cli.errors import ConfigError, DeviceError
from cda_cli.restore import open_side, restore, restore_on
from cda_cli.runtime import (
    autocast,
    describe_device,
    peak_memory,
    pick_device,
    pick_dtype,
    random_states,
    restore_random_states,
)
from cda_cli.signals import StopRequest
from cda_cli.storage import load, locate
from cda_cli.storage.checkpoint import publish

CPU = torch.device("cpu")


def test_the_model_is_that_of_the_checkpoint(finished: Path) -> None:
    """Ready to run: no dropout, and every tensor as it was saved."""
    restored = restore(finished, CPU)
    saved = load(locate(finished))
    assert not restored.model.training
    assert restored.path == locate(finished)
    assert restored.state["step"] == 6
    weights = restored.model.state_dict()
    for name, tensor in saved.model.items():
        assert weights[name].equal(tensor), name


def test_epsilon_is_that_of_the_step(finished: Path, tmp_path: Path) -> None:
    """A model in the middle of annealing was trained with another ε than it will have at the end."""
    saved = load(locate(finished))
    saved.state["config"]["model"] |= {"eps_anneal_start": 4.0, "eps_anneal_share": 1.0}
    saved.state["config"]["optim"]["schedule_steps"] = 12
    run, config = tmp_path / "run", parse(saved.state["config"])
    publish(run, step=6, model=saved.model, optimizer=saved.optimizer, rng=saved.rng, state=saved.state)
    eps = {block.attention.eps for block in restore(run, CPU).model.each_block()}
    assert eps == {annealed_eps(config.model, 6, 12)}
    assert eps.pop() == pytest.approx((4.0 * 0.5) ** 0.5)


def test_a_copy_of_the_checkpoint_alone_is_enough(finished: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(locate(finished), tmp_path / "anything")
    assert restore(copy, CPU).config == restore(finished, CPU).config


def test_the_sides_are_split_as_in_training(finished: Path) -> None:
    restored, dtype = restore_on(finished, "cpu", "auto", "auto")
    assert dtype == torch.float32
    with StopRequest() as stop:
        sides = {
            split: open_side(restored, None, split, stop, show_progress=False)
            for split in ("train", "validation", "all")
        }
        with pytest.raises(ConfigError, match="unknown split"):
            open_side(restored, None, "test", stop, show_progress=False)
    sizes = {split: sum(map(len, side.sides)) for split, side in sides.items()}
    assert sizes["all"] == sizes["train"] + sizes["validation"]
    batches, windows = sides["validation"].batches(4, max_batches=2)
    assert [len(batch.inputs) for batch in batches] == [4, 4]
    assert windows == 8


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_devices(name: str) -> None:
    device = pick_device(name)
    assert describe_device(torch.device("cpu")).startswith("cpu (")
    assert device.type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("name", "words"),
    [("cuda:99", "no device 'cuda:99'"), ("tpu", "unknown device"), ("", "unknown device"), ("meta", "not supported")],
)
def test_devices_that_are_not_there(name: str, words: str) -> None:
    with pytest.raises(DeviceError, match=words):
        pick_device(name)


def test_the_dtype_is_of_the_products_alone() -> None:
    """Outside of autocast nothing changes; inside, only what it is meant for."""
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    x = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype == torch.float32


def test_random_states_go_back() -> None:
    """Dropout after a resumed step draws what it would have drawn."""
    states = random_states(CPU)
    assert set(states) == {"cpu"}, "a run on the CPU started CUDA"
    first = torch.rand(5)
    restore_random_states(states)
    assert torch.rand(5).equal(first)
    restore_random_states({**states, "cuda.63": torch.zeros(16, dtype=torch.uint8)})
    assert torch.rand(5).equal(first), "a state of a device that is not here must be left out"


def test_peak_memory_is_that_of_this_process() -> None:
    """It can only grow, by at least what is held."""
    before = peak_memory(CPU)
    held = torch.ones(2**26, dtype=torch.uint8)
    assert peak_memory(CPU) >= before
    assert peak_memory(CPU) >= held.nbytes
