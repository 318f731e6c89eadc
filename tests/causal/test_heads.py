"""Ablation of heads, against the same done by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cda_cli.causal.heads import parse_ablations, rank_correlation
from cda_cli.data import evaluation_batches
from cda_cli.errors import ConfigError
from cda_cli.inspection import gradients
from cda_cli.model import Transformer, editing
from cda_cli.model.edits import EditLayer
from tests.causal.models import CPU, RULES, SEQ_LEN, build, differences, effects_of, text


def losses(model: Transformer, tokens: Any) -> list[Tensor]:
    """The loss of each window, nats, in the dtype of the model."""
    batches = evaluation_batches(tokens, SEQ_LEN, 1)
    return [cross_entropy(model(batch.inputs)[0], batch.targets[0], reduction="sum") for batch in batches]


def scaling(on: Tensor, change: float) -> EditLayer:
    """The edit that multiplies the outputs of the heads that `on` [L, H, 1] chooses by 1 + change."""
    return lambda layer, out: out * (1 + change * on[layer])


def test_the_heads_of_a_layer_make_up_its_output() -> None:
    """What is edited is what each head adds, before the heads are projected together."""
    model = build(depth=1, attn_bias="none")
    attention = model.each_block()[0].attention
    x = torch.randn(2, SEQ_LEN, 12, generator=torch.Generator().manual_seed(0))

    def output(*kept: int) -> Tensor:
        mask = torch.tensor([head in kept for head in range(3)])
        with torch.no_grad(), editing(model, heads=lambda layer, heads: heads * mask[:, None]):
            return attention(x)

    torch.testing.assert_close(output(0) + output(1) + output(2), output(0, 1, 2))
    with torch.no_grad():
        assert torch.equal(output(0, 1, 2), attention(x))


def raising(on: Tensor, change: float) -> EditLayer:
    """Adds `change` to the k of the heads that `on` [L, H, 1] has."""
    return lambda layer, k_BHT: k_BHT + change * on[layer]


@pytest.mark.parametrize("rule", RULES)
def test_an_ablated_head_has_its_mean_output_over_the_text(rule: dict[str, Any]) -> None:
    model, tokens = build(**rule), text(5 * SEQ_LEN + 1)
    outputs: list[Tensor] = []
    hook = model.each_block()[1].attention.to_out.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        before = sum(losses(model, tokens))
        hook.remove()
        mean = torch.cat(outputs).mean((0, 1))[4:8]

        def ablated(module: Any, args: Any) -> Tensor:
            return torch.cat((args[0][..., :4], mean.expand(1, SEQ_LEN, 4), args[0][..., 8:]), -1)

        hook = model.each_block()[1].attention.to_out.register_forward_pre_hook(ablated)
        after = sum(losses(model, tokens))
        hook.remove()
    found = effects_of(model, tokens, ablated=["heads", "heads:support,random"])
    by_name = {effect.intervention.name: effect.evaluation.loss for effect in found.effects}
    assert by_name["head[1.1]"] == pytest.approx(float(after) / (5 * SEQ_LEN), abs=1e-5)
    assert by_name["head[1.1]"] != pytest.approx(float(before) / (5 * SEQ_LEN), abs=1e-4)
    assert by_name["heads-by-support[6]"] == pytest.approx(by_name["heads-by-random[6]"]), "all heads"
    supports = {one.intervention.name: one.as_dict().get("support") for one in found.effects[:6]}
    least = min(supports, key=lambda name: supports[name] or 0.0)
    assert by_name["heads-by-support[1]"] == pytest.approx(by_name[least])


@pytest.mark.parametrize("rule", RULES)
def test_the_gradients_are_those_of_finite_differences(rule: dict[str, Any]) -> None:
    """Over single windows, since an importance is the mean of absolute values."""
    model, tokens, step = build(**rule).double(), text(4 * SEQ_LEN + 1), 1e-6
    found = gradients(model, evaluation_batches(tokens, SEQ_LEN, 3), CPU, torch.float32)

    def differences_for(**edit: Any) -> Tensor:
        sides = []
        for sign in (1, -1):
            with torch.no_grad(), editing(model, **{name: make(sign * step) for name, make in edit.items()}):
                sides.append(torch.stack(losses(model, tokens)))
        return (sides[0] - sides[1]) / (2 * step)

    by_k = differences_for(budget=lambda change: lambda layer, k: k * (1 + change))
    assert found.budget.tolist() == pytest.approx(by_k.tolist(), rel=1e-4, abs=1e-4)
    for layer, head in ((0, 0), (1, 2)):
        on = torch.zeros(2, 3, 1, dtype=torch.float64)
        on[layer, head] = 1
        more = differences_for(budget=partial(raising, on))
        assert found.head_budgets[layer, head].item() == pytest.approx(more.mean().item(), rel=1e-4, abs=1e-6)
        by_head = differences_for(heads=partial(scaling, on))
        assert found.heads[layer, head].item() == pytest.approx(by_head.abs().mean().item(), rel=1e-4)


def test_ranks_that_agree_correlate() -> None:
    up = torch.tensor([1.0, 2.0, 5.0, 9.0])
    assert rank_correlation(up, up**3) == pytest.approx(1)
    assert rank_correlation(up, -up) == pytest.approx(-1)
    # Ties share the mean of their ranks: 1.5, 1.5, 3, 4 against 1, 2, 3, 4.
    assert rank_correlation(torch.tensor([0.0, 0.0, 1.0, 2.0]), up) == pytest.approx(0.948683, abs=1e-5)
    assert rank_correlation(torch.ones(4), up) != rank_correlation(torch.ones(4), up), "NaN: it has no ranks"


@pytest.mark.parametrize("words", ["", "head", "heads:", "heads:supprt", "heads:support,", "units"])
def test_what_cannot_be_ablated_is_refused(words: str) -> None:
    with pytest.raises(ConfigError, match=r"ablate|order"):
        parse_ablations([words])


def test_an_order_of_equal_heads_is_refused() -> None:
    with pytest.raises(ConfigError, match="all heads have the same k"):
        effects_of(build(attention="softmax"), text(70), ablated=["heads:k"])
    assert differences(effects_of(build(attention="softmax"), text(70), ablated=["heads:random"]))
