"""An ε that anneals as a factor on the query gives what an ε that is a number from the start gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from cda_cli.config import ModelConfig
from cda_cli.model import Transformer, expected_tensors, load_state_tensors, state_tensors
from cda_cli.model.observe import ObservedAttention, observing
from tests.devices import DEVICES
from tests.model.cases import build, tiny, tokens

MODELS: list[dict[str, Any]] = [
    {},
    {"null_kv": 2, "learned_k": True, "qk_norm": True},
    {"position": "rotary", "norm": "rmsnorm"},
    {"position": "rotary", "qk_norm": True, "output_gate": True},
    {"attention": "tempered-softmax", "null_kv": 1},
    {"attention": "hard-topk"},
    {"attention": "entmax"},
]
each_model = pytest.mark.parametrize("settings", MODELS, ids=str)
EPS = (4.0, 0.7, 0.3, 0.05)


def annealing(**settings: Any) -> ModelConfig:
    """Returns settings whose ε anneals from 4 to that of `tiny`, 0.3."""
    return tiny(**settings, eps_anneal_start=4.0)


def with_number(model: Transformer, eps: float) -> Transformer:
    """Returns a model with the weights of an annealing one and a constant ε."""
    fixed = model.config.model_copy(update={"eps_anneal_start": None, "attn_eps": eps})
    other = Transformer(fixed, model.each_block()[0].attention.backend)
    load_state_tensors(other, state_tensors(model))
    return other.to(next(model.parameters()).device).train(model.training)


def loss_and_gradients(model: Transformer, batch: Tensor) -> list[Tensor]:
    loss = model(batch[:, :-1], targets_BT=batch[:, 1:]).mean()
    return [loss, *torch.autograd.grad(loss, [p for p in model.parameters() if p.numel()])]


@each_model
@pytest.mark.parametrize("eps", EPS)
def test_the_loss_and_its_gradients_are_those_of_the_number(settings: dict[str, Any], eps: float) -> None:
    model, batch = build(annealing(**settings)), tokens(tiny())
    model.set_attention_eps(eps)
    assert model.attention_eps == eps
    for found, right in zip(
        loss_and_gradients(model, batch), loss_and_gradients(with_number(model, eps), batch), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)


@each_model
def test_at_its_end_nothing_is_rounded_anew(settings: dict[str, Any]) -> None:
    model, batch = build(annealing(**settings)), tokens(tiny())
    for eps in EPS:
        model.set_attention_eps(eps)
    model.set_attention_eps(model.config.attn_eps)
    with torch.no_grad():
        assert torch.equal(model(batch), with_number(model, model.config.attn_eps)(batch))


@pytest.mark.slow
def test_the_kernels_get_the_factor_too() -> None:
    """If norm and rotation are one kernel, the factor is in the gain of the norm."""
    torch.manual_seed(0)
    config = annealing(position="rotary", qk_norm=True)
    model = Transformer(config, "triton").to(DEVICES[-1])
    batch = tokens(config).to(DEVICES[-1])
    model.set_attention_eps(1.5)
    for found, right in zip(
        loss_and_gradients(model, batch), loss_and_gradients(with_number(model, 1.5), batch), strict=True
    ):
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5)


@each_model
def test_an_observer_sees_the_weights_of_the_number(settings: dict[str, Any]) -> None:
    model, batch = build(annealing(**settings)), tokens(tiny())
    model.set_attention_eps(1.1)
    seen: list[list[Any]] = [[], []]
    for one, into in zip((model, with_number(model, 1.1)), seen, strict=True):
        with torch.no_grad(), observing(one, into.append):
            one(batch)
    attention = [[one for one in each if isinstance(one, ObservedAttention)] for each in seen]
    assert len(attention[0]) == model.config.depth
    for found, right in zip(*attention, strict=True):
        torch.testing.assert_close(found.weights, right.weights, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "graphs"), [({}, 1), ({"position": "rotary", "qk_norm": True}, 1), ({"solver": "iterative"}, 4)]
)
def test_one_compiled_graph_serves_every_eps(settings: dict[str, Any], graphs: int) -> None:
    """The iterative solver compiles for each ε, since it starts from eps_init, a number of its own."""
    torch._dynamo.reset()
    model, batch, counter = build(annealing(depth=1, **settings)), tokens(tiny()), CompileCounter()
    called = torch.compile(model, backend=counter)
    found = []
    for eps in EPS:
        model.set_attention_eps(eps)
        found.append(called(batch).detach())
        torch.testing.assert_close(found[-1], model(batch).detach(), rtol=0, atol=1e-5)
    assert counter.frame_count == graphs
    assert (found[0] - found[-1]).abs().max() > 1e-2, "ε has no effect"


@pytest.mark.parametrize("settings", MODELS[:5], ids=str)
def test_a_learned_eps_begins_as_the_number_and_is_one(settings: dict[str, Any]) -> None:
    """Also while ε anneals. In each head it is the number times e to ten times its parameter."""
    model, batch = build(annealing(**settings, learned_eps=True)), tokens(tiny())
    fixed = Transformer(annealing(**settings)).eval()
    fixed.load_state_dict({name: one for name, one in model.state_dict().items() if "log_eps" not in name})
    for eps in EPS[:2]:
        fixed.set_attention_eps(eps)
        model.set_attention_eps(eps)
        with torch.no_grad():
            assert torch.equal(model(batch), fixed(batch))
            for block in model.each_block():
                block.attention.log_eps.fill_(0.05)
            fixed.set_attention_eps(eps * math.exp(0.5))
            torch.testing.assert_close(model(batch), fixed(batch), rtol=1e-4, atol=1e-5)
            for block in model.each_block():
                block.attention.log_eps.zero_()
    with pytest.raises(RuntimeError, match="log_eps"):
        model.load_state_dict(fixed.state_dict())


def test_no_checkpoint_holds_the_factor() -> None:
    """The factor follows from the step. An older checkpoint would lack such a tensor."""
    assert expected_tensors(annealing()) == expected_tensors(tiny())


def test_softmax_has_no_eps_to_anneal() -> None:
    model, batch = build(annealing(attention="softmax")), tokens(tiny())
    with torch.no_grad():
        before = model(batch)
        model.set_attention_eps(4.0)
        assert torch.equal(model(batch), before)
    assert model.attention_eps is None
