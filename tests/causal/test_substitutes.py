"""Other attention weights, ε and k, in place of the model's own, and what ∂L/∂k says of another k."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cda_cli.causal.substitutes import initial_model, parse_substitutes
from cda_cli.data import evaluation_batches
from cda_cli.errors import ConfigError
from cda_cli.evaluation import evaluate
from cda_cli.model import Transformer
from tests.causal.models import CPU, SEQ_LEN, build, differences, effects_of, even_heads, text

SOFT_TOPK = [
    {"attention": "coordinate-descent"},
    {"attention": "coordinate-descent", "learned_k": True, "normalise": "k", "null_kv": 1},
    {"attention": "coordinate-descent", "learned_k": True, "eps_anneal_start": 2.0, "output_gate": True},
]


def loss(model: Transformer) -> float:
    return evaluate(model, evaluation_batches(text(70), SEQ_LEN, 3), CPU, torch.float32).bits_per_byte


@pytest.mark.parametrize("rule", SOFT_TOPK)
def test_the_model_comes_back_as_it_was(rule: dict[str, Any]) -> None:
    """And ε and k of its own are no change."""
    model = build(**rule)
    before = loss(model)
    every = ["gate", "capped", "free", "softmax", "k*1", "k=1,2.5", "k=40", f"eps={model.attention_eps},2"]
    found = differences(effects_of(model, text(70), substitutes=[*every, "random-weights"]))
    assert found["k-times[1]"] == pytest.approx(0, abs=1e-5)
    assert found[f"eps[{model.attention_eps:g}]"] == pytest.approx(0, abs=1e-5)
    assert found["k[2.5]"] == pytest.approx(0, abs=1e-5) or rule.get("learned_k")
    assert abs(found["eps[2]"]) > 1e-3
    assert loss(model) == before


@pytest.mark.parametrize("rule", SOFT_TOPK[:2])
def test_softmax_is_the_rule_with_k_1(rule: dict[str, Any]) -> None:
    """Both are what a model of softmax, or of another ε, computes from the same weights."""
    model = build(**rule)
    whole = loss(model)
    found = differences(effects_of(model, text(70), substitutes=["softmax", "k=1", "eps=1"]))
    assert found["softmax"] == pytest.approx(found["k[1]"], abs=1e-5)
    tempered = build(**{**rule, "attention": "tempered-softmax"})
    tempered.load_state_dict(model.state_dict(), strict=False)
    assert found["softmax"] == pytest.approx(loss(tempered) - whole, abs=1e-5)
    other = build(**rule, attn_eps=1.0)
    other.load_state_dict(model.state_dict())
    assert found["eps[1]"] == pytest.approx(loss(other) - whole, abs=1e-5)


def test_a_k_for_all_rows_is_a_model_with_that_k() -> None:
    """Also a larger k than the model has, in a model whose output is divided by k."""
    rule = {"attention": "coordinate-descent", "normalise": "k"}
    model, other = build(**rule), build(**rule, attn_k=6.0)
    other.load_state_dict(model.state_dict())
    found = differences(effects_of(model, text(70), substitutes=["k=6"]))
    assert found["k[6]"] == pytest.approx(loss(other) - loss(model), abs=1e-5)


@pytest.mark.parametrize("rule", SOFT_TOPK)
def test_capped_and_free_weights_make_up_the_whole(rule: dict[str, Any]) -> None:
    seen: dict[str, torch.Tensor] = {}
    model = build(**rule)
    attention = model.each_block()[0].attention
    tokens = torch.randint(23, (2, SEQ_LEN), generator=torch.Generator().manual_seed(1))
    for name, substitute in zip(("capped", "free"), parse_substitutes(["capped", "free"]), strict=True):
        with torch.no_grad(), substitute.applied(model):
            handle = attention.to_out.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
            model(tokens)
            handle.remove()
    handle = attention.to_out.register_forward_pre_hook(lambda _, args: seen.update(whole=args[0]))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    torch.testing.assert_close(seen["capped"] + seen["free"], seen["whole"], rtol=1e-4, atol=1e-5)
    assert seen["capped"].abs().max() > 0.01
    assert seen["free"].abs().max() > 0.01


@pytest.mark.parametrize("rule", [SOFT_TOPK[0], SOFT_TOPK[2]])
def test_the_derivative_predicts_a_small_change_of_k(rule: dict[str, Any]) -> None:
    """To first order, so the slope over both sides is nearer still. No row caps anything, so none meets a kink."""
    model = even_heads(**rule, attn_eps=1.0, attn_k=2.3)
    found = effects_of(model, text(70), substitutes=["k*1.01,0.99"])
    up, down = found.effects
    assert up.predicted is not None
    assert down.predicted is not None
    assert up.predicted.value == pytest.approx(-down.predicted.value)
    slope = (up.difference.value - down.difference.value) / 2
    assert abs(up.predicted.value) > 1e-4
    assert slope == pytest.approx(up.predicted.value, rel=0.01)
    assert up.residual is not None
    assert up.residual.value == pytest.approx(up.difference.value - up.predicted.value)
    assert {"predicted", "predicted_interval", "residual_interval"} <= set(up.as_dict())


def test_where_nothing_is_capped_k_is_only_a_gain() -> None:
    """So it has no effect, and no predicted one, if the output is divided by it. A null key leaves no row unbounded."""
    model = even_heads(normalise="k", null_kv=1, attn_eps=1.0, attn_k=1.5)
    (found,) = effects_of(model, text(70), substitutes=["k*0.9"]).effects
    assert found.predicted is not None
    assert found.predicted.value == pytest.approx(0, abs=1e-6)
    assert found.difference.value == pytest.approx(0, abs=1e-6)


def test_random_weights_are_those_with_which_training_begins() -> None:
    model = build(attention="coordinate-descent")
    (found,) = effects_of(model, text(70), substitutes=["random-weights"]).effects
    torch.manual_seed(0)
    assert found.evaluation.bits_per_byte == pytest.approx(loss(Transformer(model.config)))
    assert initial_model(model).attention_eps == model.attention_eps


def test_a_row_that_sees_no_more_than_k_keys_is_no_evidence() -> None:
    """All of them have the weight 1, so the gate control leaves them, and counts none of them."""
    model = build(attention="coordinate-descent", attn_k=20.0)
    (gate,) = effects_of(model, text(70), substitutes=["gate"]).effects
    assert gate.difference.value == pytest.approx(0, abs=1e-6)
    assert math.isnan(gate.as_dict()["gate_equivalent_rows"])


@pytest.mark.parametrize("words", ["", "tate", "gate=2", "eps", "eps=", "eps=0", "k=-1", "k*x", "eps=inf", "k=1,"])
def test_what_is_no_substitute_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="--as"):
        parse_substitutes([words])


@pytest.mark.parametrize("words", ["gate", "capped", "free", "k=2", "k*1.01", "eps=2"])
def test_what_means_nothing_for_a_rule_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="softmax attention has no"):
        effects_of(build(attention="softmax"), text(70), substitutes=[words])
