"""The schedule of the learning rate, which parameters decay, and the protocol of a step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_map_only

from cda_cli.config import ModelConfig, OptimConfig
from cda_cli.model import Transformer
from cda_cli.storage import pack_optimizer
from cda_cli.training.nonfinite import StepResult
from cda_cli.training.optimizer import (
    GuardedOptimizer,
    MuonAndAdamW,
    build_optimizer,
    learning_rate,
    restore_optimizer,
    set_learning_rate,
)
from tests.devices import DEVICES

SETTINGS = {"lr": 0.5, "min_lr_ratio": 0.1, "warmup_steps": 4}


def test_warm_up_is_a_line_to_the_peak() -> None:
    """The first step must not have a rate of 0, which would waste it."""
    config = OptimConfig(**SETTINGS)
    assert [learning_rate(config, 100, step) for step in range(4)] == [0.125, 0.25, 0.375, 0.5]
    assert learning_rate(config, 100, 4) == 0.5, "the cosine begins at the peak"


def test_cosine_has_its_middle_and_its_end() -> None:
    config = OptimConfig(**SETTINGS)
    assert learning_rate(config, 104, 54) == pytest.approx(0.5 * 0.55), "halfway: the mean of peak and end"
    assert learning_rate(config, 104, 104) == pytest.approx(0.05)
    assert learning_rate(config, 104, 29) == pytest.approx(0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))


@pytest.mark.parametrize("step", [105, 1000, 10**7])
def test_beyond_the_schedule_it_stays_at_the_end(step: int) -> None:
    """A cosine that turns would raise the rate again in a run that is trained for longer."""
    assert learning_rate(OptimConfig(**SETTINGS), 104, step) == pytest.approx(0.05)


def test_constant_stays_at_the_peak() -> None:
    config = OptimConfig(schedule="constant", **SETTINGS)
    assert learning_rate(config, 100, 1) == 0.25
    assert {learning_rate(config, 100, step) for step in (4, 50, 100, 10**6)} == {0.5}


def test_no_warm_up() -> None:
    config = OptimConfig(lr=0.5, warmup_steps=0)
    assert learning_rate(config, 10, 0) == 0.5


@given(
    warmup=st.integers(0, 50), schedule=st.integers(1, 60), step=st.integers(0, 200),
    ratio=st.just(0.0) | st.floats(1e-6, 1), kind=st.sampled_from(["cosine", "constant"]),
)  # fmt: skip
def test_the_rate_is_always_within_its_bounds(warmup: int, schedule: int, step: int, ratio: float, kind: str) -> None:
    """That holds also if the warm-up is longer than the schedule."""
    config = OptimConfig(lr=0.5, warmup_steps=warmup, min_lr_ratio=ratio, schedule=kind)  # type: ignore[arg-type]
    rate = learning_rate(config, schedule, step)
    assert 0 < rate <= 0.5 or (ratio == 0 and rate == pytest.approx(0))
    if step >= warmup:
        assert rate >= 0.5 * ratio * (1 - 1e-9)
        assert learning_rate(config, schedule, step + 1) <= rate * (1 + 1e-9)


def a_model(**settings: object) -> Transformer:
    given_settings = {"vocab_size": 7, "seq_len": 5, "dim": 8, "depth": 2, "heads": 2, "learned_k": True, **settings}
    return Transformer(ModelConfig(**given_settings))


def decayed(model: Transformer) -> dict[str, bool]:
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    return {
        names[id(parameter)]: group["weight_decay"] > 0
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_matrices_are_decayed_gains_and_biases_not(norm: str) -> None:
    """Decay pulls a gain to 0, but a gain without effect is 1."""
    found = decayed(a_model(norm=norm, qk_norm=True, attn_bias="all"))
    assert found["token_embedding.weight"]
    assert found["blocks.1.attention.to_qkv.weight"]
    for name, is_decayed in found.items():
        if name.endswith("bias") or "norm" in name:
            assert not is_decayed, f"{name} is decayed"
    assert sum(found.values()) >= 2 + 5 * 2


def test_null_keys_are_not_decayed() -> None:
    """They are learned vectors like biases, and nothing multiplies with them as matrices."""
    found = decayed(a_model(null_kv=1))
    assert not found["blocks.0.attention.null_kv"]


def test_every_parameter_is_trained_once() -> None:
    """A tied embedding in two groups would be stepped twice, and one in no group never."""
    model = a_model(tied_embeddings=True, null_kv=2)
    assert set(decayed(model)) == {name for name, _ in model.named_parameters()}
    no_null = a_model(null_kv=0)
    assert set(decayed(no_null)) == {name for name, p in no_null.named_parameters() if p.numel()}


def test_the_settings_reach_adamw() -> None:
    optimizer = build_optimizer(a_model(), OptimConfig(lr=0.25, beta1=0.5, beta2=0.75))
    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.75))
    set_learning_rate(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}


def with_muon(model: Transformer, **settings: float) -> MuonAndAdamW:
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", weight_decay=0.3, **settings))
    assert isinstance(optimizer, MuonAndAdamW)
    return optimizer


def test_muon_has_the_matrices_of_the_blocks_and_no_others() -> None:
    """Embeddings and the logits are matrices too, but their rows are trained one by one."""
    model = a_model(tied_embeddings=False, null_kv=2, kv_heads=1, attn_bias="all")
    optimizer = with_muon(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = {
        part: {names[id(p)] for group in one.param_groups for p in group["params"]}
        for part, one in optimizer.parts.items()
    }
    assert not owned["muon"] & owned["adamw"]
    assert owned["muon"] | owned["adamw"] == set(names.values())
    assert owned["muon"] == {
        name for name in names.values() if "blocks" in name and model.get_parameter(name).ndim == 2
    }
    assert {"token_embedding.weight", "to_logits.weight"} <= owned["adamw"]
    assert {"blocks.0.attention.to_qkv.weight", "blocks.1.feed_forward.proj_in.weight"} <= owned["muon"]


def test_a_step_of_muon_is_as_large_as_one_of_adamw() -> None:
    """One rate serves both: the root mean square of a step is about 0.2 of the rate, whatever the gradient's size."""
    for size in (1e-3, 1e3):
        model = a_model(dim=64)
        weight = model.get_parameter("blocks.0.attention.to_qkv.weight")
        for parameter in model.parameters():
            parameter.grad = size * torch.randn_like(parameter)
        optimizer = build_optimizer(model, OptimConfig(optimizer="muon", weight_decay=0.0))
        set_learning_rate(optimizer, 0.5)
        before = weight.detach().clone()
        optimizer.step()
        step = (weight.detach() - before).square().mean().sqrt().item()
        assert step == pytest.approx(0.5 * 0.2, rel=0.2)
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in model.parameters() if parameter.numel())


def test_a_restored_optimizer_keeps_its_settings_and_gets_the_state() -> None:
    """The saved settings must not undo what a resumed run changed."""
    for name in ("adamw", "muon"):
        model = a_model()
        before = build_optimizer(model, OptimConfig(optimizer=name, weight_decay=0.25, beta1=0.5))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        before.step()
        after = build_optimizer(model, OptimConfig(optimizer=name, weight_decay=0.5, beta1=0.75))
        restore_optimizer(after, before.state_dict())
        assert {group["weight_decay"] for group in after.param_groups} == {0.0, 0.5}
        assert {group["betas"] for group in after.param_groups if "betas" in group} == {(0.75, 0.95)}
        (saved, first), (restored, second) = pack_optimizer(before.state_dict()), pack_optimizer(after.state_dict())
        assert saved
        assert saved.keys() == restored.keys()
        assert all(saved[key].equal(restored[key]) for key in saved), name
        assert first != second


@pytest.fixture
def group() -> Iterator[None]:
    """Makes a process group of one process."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def taken_in_launch(optimizer: torch.optim.AdamW, loss: torch.Tensor) -> None:
    """Steps once, and checks that `launch` did everything and `settle` nothing."""
    guarded = GuardedOptimizer(optimizer)
    result = StepResult(loss, torch.ones_like(loss))
    guarded.launch(result)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert all(parameter.grad is None for parameter in parameters)
    launched = [parameter.detach().clone() for parameter in parameters]
    guarded.settle(result.read().is_finite)
    assert all(old.equal(new) for old, new in zip(launched, parameters, strict=True))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("seen", [math.nan, math.inf, 1.0])
def test_the_device_leaves_a_step_out_that_is_not_finite(seen: float, sharded: bool, device: str) -> None:
    """Weights, averages and the count of steps stay as they were, and the next step is taken as if nothing happened."""
    model = a_model(null_kv=1).to(device)
    if sharded:
        fully_shard(model, mesh=init_device_mesh(device, (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for loss in (2.0, seen, 3.0):
        before = {name: tensor.clone() for name, tensor in pack_optimizer(optimizer.state_dict())[0].items()}
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, loss)
        taken_in_launch(optimizer, torch.tensor(loss, device=device))
        taken = math.isfinite(loss)
        for old, new in zip(weights, model.parameters(), strict=True):
            assert old.equal(new) is not taken
        after, _ = pack_optimizer(optimizer.state_dict())
        assert all(after[name].equal(tensor) is not taken for name, tensor in before.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_state_of_another_device_goes_on_as_this_one_does(name: str, device: str) -> None:
    """AdamW takes fused steps here, whether it did so where the state was saved or not."""
    model = a_model(null_kv=1).to(device)
    optimizer = build_optimizer(model, OptimConfig(optimizer=name))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = optimizer.state_dict()
    for part in state.values() if name == "muon" else [state]:
        for group in part["param_groups"]:
            group |= {"fused": None, "foreach": True} if "fused" in group else {}
    on_cpu = tree_map_only(torch.Tensor, torch.Tensor.cpu, state)
    restored = build_optimizer(model, OptimConfig(optimizer=name))
    restore_optimizer(restored, on_cpu)
    assert {group.get("fused", True) for group in restored.param_groups} == {True}
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    guarded = GuardedOptimizer(restored)
    guarded.launch(StepResult(torch.tensor(1.0, device=device), torch.tensor(1.0, device=device)))
    guarded.settle(True)
    assert guarded.steps_at_launch is (name == "adamw")
    assert not any(old.equal(new) for old, new in zip(weights, model.parameters(), strict=True) if new.numel())


@pytest.mark.parametrize("finite", [True, False])
def test_muon_waits_for_the_verdict(finite: bool) -> None:
    """It cannot leave a step out by itself, so nothing may happen before the host has judged it."""
    model, calls = a_model(null_kv=1), []
    optimizer = GuardedOptimizer(
        build_optimizer(model, OptimConfig(optimizer="muon")), lambda: calls.append(gradients_are_dropped(model))
    )
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = StepResult(torch.tensor(1.0 if finite else torch.nan), torch.tensor(1.0))
    optimizer.launch(result)
    assert not optimizer.steps_at_launch
    assert not calls
    assert all(old.equal(new) for old, new in zip(before, model.parameters(), strict=True))
    optimizer.settle(result.read().is_finite)
    assert calls == [True], "what comes after a step comes once, with the gradients dropped"
    assert all(old.equal(new) is not finite for old, new in zip(before, model.parameters(), strict=True))


def gradients_are_dropped(model: Transformer) -> bool:
    return all(parameter.grad is None for parameter in model.parameters())
