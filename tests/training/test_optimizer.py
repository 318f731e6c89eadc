"""The schedule of the learning rate, and what is decayed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.config import ModelConfig, OptimConfig
from cda_cli.model import Transformer
from cda_cli.training.optimizer import build_optimizer, learning_rate, set_learning_rate

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
    """Also where the warm-up is longer than the schedule."""
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
    """Decay pulls a gain to 0, which is not where it is at rest."""
    found = decayed(a_model(norm=norm, qk_norm=True))
    assert found["token_embedding.weight"]
    assert found["blocks.1.attention.to_qkv.weight"]
    for name, is_decayed in found.items():
        if name.endswith("bias") or "norm" in name:
            assert not is_decayed, f"{name} is decayed"
    assert sum(found.values()) >= 2 + 5 * 2


def test_null_keys_are_not_decayed() -> None:
    """They are learned vectors, as biases are, and no matrix that is multiplied with."""
    found = decayed(a_model(null_kv=1))
    assert not found["blocks.0.attention.null_kv"]


def test_every_parameter_is_trained_once() -> None:
    """A tied embedding that is in two groups would be stepped twice; one that is in none, never."""
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
