"""Observation passes on the very weights that made the output, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.model import StaticCache, Transformer
from cda_cli.model.attention import Attention
from cda_cli.model.observe import ObservedAttention, ObservedFeedForward, observing
from tests.model.cases import build, cases, name, tiny, tokens

every_case = pytest.mark.parametrize("config", cases(), ids=name)
Observations = list[ObservedAttention | ObservedFeedForward]


def watched(model: Transformer, batch: Tensor) -> tuple[Tensor, Observations]:
    seen: Observations = []
    with torch.no_grad(), observing(model, seen.append):
        logits = model(batch)
    return logits, seen


@every_case
def test_some_of_the_queries_are_seen_as_with_all_others(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three neighbours the middle one, row after row."""
    model, batch = build(config), tokens(config)
    logits, seen = watched(model, batch)
    some: Observations = []
    monkeypatch.setattr("cda_cli.model.rules.base.BLOCK_SCORES", 1)
    with torch.no_grad(), observing(model, some.append, apart=3):
        torch.testing.assert_close(model(batch), logits, atol=1e-5, rtol=0)
    for all_rows in seen:
        found = [one for one in some if one.layer == all_rows.layer and type(one) is type(all_rows)]
        if isinstance(all_rows, ObservedFeedForward):
            torch.testing.assert_close(found[0].activations, all_rows.activations, atol=1e-5, rtol=1e-5)
            continue
        assert [one.position for one in found] == list(range(1, batch.shape[1], 3))
        for field in ("weights", "sparsity_k", "output_scale", "queries"):
            rows = torch.cat([getattr(one, field) for one in found], 2)
            torch.testing.assert_close(rows, getattr(all_rows, field)[:, :, 1::3], atol=1e-5, rtol=1e-5, msg=field)
        torch.testing.assert_close(found[0].keys, all_rows.keys, atol=1e-5, rtol=1e-5)


def passed(model: Transformer, batch: Tensor) -> dict[Any, tuple[Tensor, Tensor]]:
    """Returns input and output of each module in a forward pass without observation."""
    through: dict[Any, tuple[Tensor, Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda module, args, out: through.update({module: (args[0], out)}))
        for module in model.modules()
    ]
    with torch.no_grad():
        model(batch)
    for hook in hooks:
        hook.remove()
    return through


def output_by(seen: ObservedAttention, attention: Attention, x: Tensor) -> Tensor:
    """Returns the output of a layer for the input `x` [B, T, C] under the weights that were seen."""
    (B, T, _), config = x.shape, attention.config
    values = attention.to_qkv(x).unflatten(-1, (-1, config.head_width))[:, :, -config.key_heads :].transpose(1, 2)
    values = torch.cat((attention.null_kv[1].expand(B, -1, -1, -1), values), 2)
    out = seen.weights @ values.repeat_interleave(config.heads // config.key_heads, 1)
    if config.normalise == "k":
        out = out / seen.sparsity_k.unsqueeze(-1)
    if attention.to_gate is not None:
        gate = 1 + (attention.config.attn_k - 1) * attention.to_gate(x).sigmoid()
        out = out * gate.transpose(1, 2).unsqueeze(-1)
    return attention.to_out(out.transpose(1, 2).reshape(B, T, -1))


@every_case
def test_watching_does_not_change_the_logits(config: ModelConfig) -> None:
    model, batch = build(config), tokens(config)
    logits, _ = watched(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(batch), atol=1e-5, rtol=0)


@every_case
def test_the_weights_and_activations_make_the_output_of_their_layer(config: ModelConfig) -> None:
    """Measures of any other weights would say nothing about the model."""
    model, batch = build(config), tokens(config)
    _, seen = watched(model, batch)
    through = passed(model, batch)
    assert [(type(one), one.layer) for one in seen] == [
        (kind, layer) for layer in range(config.depth) for kind in (ObservedAttention, ObservedFeedForward)
    ]
    B, T = batch.shape
    for one in seen:
        block = model.each_block()[one.layer]
        with torch.no_grad():
            if isinstance(one, ObservedAttention):
                assert one.weights.shape == (B, config.heads, T, T + config.null_kv)
                given, expected = through[block.attention]
                made = output_by(one, block.attention, given)
            else:
                assert one.activations.shape == (B, T, config.ff_units)
                expected = through[block.feed_forward][1]
                made = block.feed_forward.proj_out(one.activations)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=0)


@every_case
def test_k_is_that_of_each_row_and_the_rows_sum_to_it(config: ModelConfig) -> None:
    model, batch = build(config), tokens(config)
    _, seen = watched(model, batch)
    through = passed(model, batch)
    visible = torch.arange(1, batch.shape[1] + 1) + config.null_kv
    for one in seen:
        if not isinstance(one, ObservedAttention):
            continue
        attention = model.each_block()[one.layer].attention
        expected = torch.tensor(config.attn_k if attention.rule.has_budget else 1.0)
        if attention.to_learned_k is not None:
            with torch.no_grad():
                raw = attention.to_learned_k(through[attention][0]).transpose(1, 2)
            expected = 1 + (config.attn_k - 1) * raw.sigmoid()
        torch.testing.assert_close(one.sparsity_k, expected.expand(one.weights.shape[:-1]), atol=1e-5, rtol=0)
        assert (one.weights >= 0).all()
        assert (one.weights <= 1 + 1e-5).all()
        if config.attention == "softmax" or config.solver == "exact":  # an iteration is not at the optimum yet
            torch.testing.assert_close(one.weights.sum(-1), one.sparsity_k.minimum(visible.float()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["softmax", "coordinate-descent"])
def test_watching_ends_even_where_it_fails(attention: str) -> None:
    """An observer left behind would make every later pass dense and slow, and nothing would say so."""
    model, batch = build(tiny(attention=attention)), tokens(tiny())
    seen: Observations = []

    def failing(one: ObservedAttention | ObservedFeedForward) -> None:
        seen.append(one)
        raise RuntimeError("the observer's own fault")

    with pytest.raises(RuntimeError, match="own fault"), observing(model, failing):
        model(batch)
    assert len(seen) == 1
    model(batch)
    assert len(seen) == 1, "the model is still watched after an error"
    with observing(model, seen.append):
        model(batch)
    before = len(seen)
    model(batch)
    assert len(seen) == before, "the model is still watched afterwards"


@pytest.mark.parametrize("attention", ["softmax", "coordinate-descent"])
def test_what_is_seen_holds_no_graph(attention: str) -> None:
    """Otherwise an inspection of a long text would keep every activation alive."""
    model, seen = build(tiny(attention=attention, learned_k=True)), []
    with observing(model, seen.append):
        model(tokens(tiny())).sum().backward()
    assert not any(tensor.requires_grad for one in seen for tensor in one if isinstance(tensor, Tensor))
    assert model.token_embedding.weight.grad is not None, "a watched pass cannot be trained on"


@pytest.mark.parametrize("position", ["learned", "rotary"])
@pytest.mark.parametrize("attention", ["softmax", "coordinate-descent"])
def test_a_cached_pass_can_be_watched(attention: str, position: str) -> None:
    """Its weights are the last rows of those of the whole sequence."""
    model = build(config := tiny(attention=attention, position=position, null_kv=1))
    batch = tokens(config)
    cache = StaticCache(model, len(batch), torch.float32).rows()
    seen: Observations = []
    with torch.no_grad():
        model(batch[:, :6], cache)
        with observing(model, seen.append):
            model(batch[:, 6:], cache)
    for late, whole in zip(seen, watched(model, batch)[1], strict=True):
        if isinstance(late, ObservedAttention) and isinstance(whole, ObservedAttention):
            assert (late.null_keys, late.position, whole.position) == (1, 6, 0)
        by_row, dim = (slice(1, 3), 2) if isinstance(late, ObservedAttention) else (slice(1, 2), 1)
        for part, all_rows in zip(late[by_row], whole[by_row], strict=True):
            torch.testing.assert_close(part, all_rows.narrow(dim, 6, config.seq_len - 6), atol=1e-5, rtol=0)
