"""With every setting the model computes, its gradients are right, it is causal, and its cache does not show."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from cda_cli.config import ModelConfig
from cda_cli.model import StaticCache, Transformer
from tests.model.cases import OPTIONS, build, cases, name, table, tiny, tokens

every_case = pytest.mark.parametrize("config", cases(), ids=name)


def loss(model: Transformer, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def test_the_cases_hold_every_combination_of_any_three_options() -> None:
    """Otherwise two settings that do not work together could go unseen."""
    for columns in itertools.combinations(range(len(OPTIONS)), 3):
        assert len({tuple(row[column] for column in columns) for row in table()}) == 8


@every_case
def test_training_mode_computes_and_gradients_reach_every_parameter(config: ModelConfig) -> None:
    """A parameter without gradient is one that is made, saved and never trained."""
    model, batch = build(config).train(), tokens(config)
    torch.manual_seed(2)
    logits = model(batch)
    assert logits.shape == (*batch.shape, config.vocab_size)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten()).backward()
    for key, parameter in model.named_parameters():
        if parameter.numel():
            assert parameter.grad is not None, f"no gradient reaches {key}"
            assert torch.isfinite(parameter.grad).all(), f"the gradient of {key} is not finite"
            assert parameter.grad.any(), f"the gradient of {key} is 0"


@every_case
def test_the_gradient_of_each_parameter_is_the_derivative(config: ModelConfig) -> None:
    """It is compared with differences of the loss in float64, along a random direction for each parameter."""
    model, batch = build(config).double(), tokens(config)
    loss(model, batch).backward()
    generator = torch.Generator().manual_seed(3)
    step = 1e-6
    for key, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step * direction
                ends.append(loss(model, batch).item())
                parameter -= sign * step * direction
        slope = (ends[0] - ends[1]) / (2 * step)
        expected = (parameter.grad * direction).sum().item()
        assert slope == pytest.approx(expected, rel=1e-4, abs=1e-7), f"the gradient of {key} is not the derivative"


@every_case
def test_a_later_token_never_changes_an_earlier_logit(config: ModelConfig) -> None:
    """A model that sees the future has a loss that means nothing."""
    model, batch = build(config), tokens(config)
    with torch.no_grad():
        logits = model(batch)
        for position in range(config.seq_len):
            changed = batch.clone()
            changed[:, position:] = (batch[:, position:] + 1 + position) % config.vocab_size
            difference = (model(changed) - logits).abs().amax((0, 2))
            assert not (difference[:position] > 1e-6).any(), f"token {position} is seen before it"
            assert difference[position] > 1e-4, f"token {position} does not change its own logits"


@every_case
def test_the_length_and_the_batch_do_not_show(config: ModelConfig) -> None:
    """The logits of a sequence are the same alone and in a batch, and where it ends early."""
    model, batch = build(config), tokens(config, batch=3)
    with torch.no_grad():
        logits = model(batch)
        for length in (1, 2, 7):
            torch.testing.assert_close(model(batch[1:2, :length]), logits[1:2, :length], atol=1e-5, rtol=0)


@every_case
@settings(max_examples=8)
@given(cuts=st.sets(st.integers(1, 10)), length=st.integers(1, 11), batch_size=st.integers(1, 3))
def test_logits_with_a_cache_are_those_without(
    config: ModelConfig, cuts: set[int], length: int, batch_size: int
) -> None:
    """The chunks have any sizes, up to the full context."""
    model, batch = build(config), tokens(config, batch_size, length)
    cache = StaticCache(model, len(batch), torch.float32).rows()
    ends = sorted({cut for cut in cuts if cut < length} | {length})
    with torch.no_grad():
        chunks = [model(batch[:, start:stop], cache) for start, stop in zip([0, *ends], ends, strict=False)]
        assert cache.length == length
        torch.testing.assert_close(torch.cat(chunks, 1), model(batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_more_positions_than_the_context_are_refused(position: str) -> None:
    """A learned position would not exist, or a cache would silently overflow."""
    model = build(config := tiny(position=position))
    batch = tokens(config, 1)
    with pytest.raises(ValueError, match="12 positions exceed the context of 11"):
        model(torch.cat((batch, batch[:, :1]), 1))
    cache = StaticCache(model, 1, torch.float32).rows()
    model(batch, cache)
    with pytest.raises(ValueError, match="12 positions exceed the context of 11"):
        model(batch[:, :1], cache)


def test_dropout_is_on_in_training_alone() -> None:
    model = build(config := tiny(dropout=0.5))
    batch = tokens(config)
    assert torch.equal(model(batch), model(batch)), "dropout is on in evaluation mode"
    model.train()
    assert not torch.equal(model(batch), model(batch)), "dropout is off in training mode"


def test_dropout_is_on_the_embeddings_and_on_each_branch() -> None:
    """A branch left out is regularised less than the setting says, and the loss does not show it."""
    model = build(config := tiny(dropout=0.5)).train()
    zeros: list[float] = []
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda module, args, out: zeros.append((out == 0).float().mean().item()))
    model(tokens(config, batch=8))
    assert len(zeros) == 1 + 2 * config.depth, "a branch, or the embeddings, pass no dropout"
    assert all(0.4 < share < 0.6 for share in zeros)


@pytest.mark.parametrize("setting", [{"learned_k": True}, {"output_gate": True}], ids=["learned_k", "output_gate"])
def test_the_control_and_the_learned_k_cost_the_same_and_start_at_k(setting: dict[str, bool]) -> None:
    """The gate is the control of the learned k only if both add the same parameters, and a bias of −∞ is k = 1."""
    plain = build(tiny(attn_k=1.0))
    config = tiny(**setting, learned_k_bias=-1e4)
    model = build(config)
    added = model.parameter_count() - plain.parameter_count()
    assert added == config.depth * (config.dim + 1) * config.heads
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    batch = tokens(config)
    reference = plain if config.learned_k else _with(plain, tiny())
    torch.testing.assert_close(model(batch), reference(batch), atol=1e-6, rtol=0)


@pytest.mark.parametrize("attention", ["softmax", "coordinate-descent"])
def test_a_unit_gate_is_a_sigmoid_whatever_k_is(attention: str) -> None:
    """With bias 0 and no weight it halves the output. A large bias makes it 1, and a very negative one makes it 0."""
    settings: dict[str, Any] = {"attention": attention, "attn_k": 2.5, "depth": 1}
    gated = build(tiny(**settings, output_gate=True, output_gate_range="unit"))
    attention_layer, x = gated.each_block()[0].attention, torch.randn(1, 5, 12)
    assert attention_layer.to_gate is not None
    assert (attention_layer.to_gate.bias == 0).all()
    torch.nn.init.zeros_(attention_layer.to_gate.weight)
    ungated = _with(gated, tiny(**settings), strict=False).each_block()[0].attention
    for bias, expected in ((0.0, 0.5), (1e4, 1.0), (-1e4, 0.0)):
        torch.nn.init.constant_(attention_layer.to_gate.bias, bias)
        torch.testing.assert_close(attention_layer(x), expected * ungated(x), atol=1e-6, rtol=0)


def _with(model: Transformer, config: ModelConfig, strict: bool = True) -> Transformer:
    """Returns a model with the weights of `model` and other settings."""
    other = build(config)
    other.load_state_dict(model.state_dict(), strict=strict)
    return other
