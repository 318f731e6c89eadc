"""The moving average of the weights."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from cda_cli.config import ModelConfig
from cda_cli.model import Transformer, state_tensors
from cda_cli.training.average import WeightAverage


def a_model(tied: bool = True) -> Transformer:
    config = ModelConfig(vocab_size=7, seq_len=5, dim=8, depth=1, heads=2, tied_embeddings=tied, learned_k=True)
    return Transformer(config)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight))


@pytest.mark.parametrize("decay", [0.15, 0.9])
def test_it_is_the_recurrence_in_float64(decay: float) -> None:
    """The first steps have a smaller decay, so that the random start is soon forgotten."""
    model = a_model()
    average = WeightAverage(model, decay)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters()}
    for step in range(1, 40):
        move(model)
        average.update(step)
        d = min(decay, (1 + step) / (10 + step))
        for name, weight in model.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * weight.detach().double()
    for name, tensor in average.tensors().items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-5)
        assert tensor.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_its_tensors_are_those_of_a_checkpoint(tied: bool) -> None:
    model = a_model(tied)
    assert {n: t.shape for n, t in WeightAverage(model, 0.5).tensors().items()} == {
        n: t.shape for n, t in state_tensors(model).items()
    }


def test_it_takes_the_model_s_place_and_gives_it_back() -> None:
    """The weights are exchanged to the last bit, in the same memory, also if what runs in between fails."""
    model = a_model()
    average = WeightAverage(model, 0.5)
    move(model)
    average.update(1)
    own = [weight.detach().clone() for weight in model.parameters()]
    averaged = [tensor.clone() for tensor in average.tensors().values()]
    places = [weight.data_ptr() for weight in model.parameters()]
    assert any(not a.equal(b) for a, b in zip(own, averaged, strict=True))
    with contextlib.suppress(RuntimeError), average.in_place():
        assert all(weight.equal(a) for weight, a in zip(model.parameters(), averaged, strict=True))
        assert [weight.data_ptr() for weight in model.parameters()] == places
        raise RuntimeError("failed")
    assert all(weight.equal(o) for weight, o in zip(model.parameters(), own, strict=True))
    assert all(tensor.equal(a) for tensor, a in zip(average.tensors().values(), averaged, strict=True))


def test_it_does_not_follow_by_itself() -> None:
    model = a_model()
    average = WeightAverage(model, 0.5)
    before = {name: tensor.clone() for name, tensor in average.tensors().items()}
    move(model)
    assert all(tensor.equal(before[name]) for name, tensor in average.tensors().items())
    average.load({name: tensor + 1 for name, tensor in before.items()})
    assert all(tensor.equal(before[name] + 1) for name, tensor in average.tensors().items())
