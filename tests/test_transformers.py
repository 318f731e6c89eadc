"""Soft top-k attention in models of transformers: equal to softmax, or to the specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, PreTrainedModel
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

import cda_cli.transformers as soft_topk
from cda_cli.errors import ConfigError
from cda_cli.ops import reference_soft_topk, soft_topk_attention
from tests.transformers_models import BART, DECODERS, DTYPES, build, close, padded


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("other", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DECODERS)
def test_unset_it_is_softmax(kind: str, other: str, left: bool) -> None:
    """Logits and gradients, with padding: a model that lost its mask would differ in both."""
    tokens, mask = padded(9, 5, 7, left=left)
    logits, gradients = {}, {}
    for name in (soft_topk.NAME, other):
        model = build(kind, name, dtype=DTYPES[other])
        output = model(tokens, attention_mask=mask).logits[mask.bool()]
        output.square().sum().backward()
        logits[name] = output.detach()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    close(logits[soft_topk.NAME], logits[other])
    close(gradients[soft_topk.NAME], gradients[other], 10)


def generated(model: Any, tokens: Tensor, mask: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """The six tokens that greedy generation adds to each row, and their logits."""
    made = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return made.sequences[:, tokens.shape[1] :], torch.stack(made.logits, 1)


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("kind", DECODERS)
def test_generation_of_unequal_prompts_is_that_of_each_alone(kind: str, cache: dict[str, Any]) -> None:
    """A static cache holds keys that are not there yet, before and after the first step."""
    model = build(kind)
    soft_topk.use(model, k=2, eps=0.5)
    tokens, mask = padded(9, 5, 7)
    made, logits = generated(model, tokens, mask, **cache)
    for row, length in enumerate((9, 5, 7)):
        prompt = tokens[row : row + 1, 9 - length :]
        text = torch.cat((prompt, made[row : row + 1]), 1)
        alone = model(text).logits[0, length - 1 : -1]
        close(logits[row], alone.float())  # generate() rounds its logits


@pytest.mark.parametrize("kind", DECODERS)
def test_unset_it_generates_what_softmax_does(kind: str) -> None:
    tokens, mask = padded(9, 5, 7)
    assert torch.equal(generated(build(kind), tokens, mask)[0], generated(build(kind, "sdpa"), tokens, mask)[0])


def each_layers_call(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What attention gets and returns in each layer, in order, from the next forward on."""
    calls: list[dict[str, Tensor]] = []

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any) -> Any:
        output, weights = soft_topk.attention(module, query, key, value, *args, **kw)
        calls.append({"query": query, "key": key, "value": value, "output": output})
        return output, weights

    monkeypatch.setitem(AttentionInterface._global_mapping, soft_topk.NAME, attention)
    return calls


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_layer_computes_the_specification(kind: str, normalise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a k and an ε for each layer, on the layer's own queries, keys and values."""
    model = build(kind)
    soft_topk.use(model, k=[2, 3.5], eps=[0.5, 0.25], normalise=normalise)
    calls = each_layers_call(model, monkeypatch)
    tokens, mask = padded(9, 5)
    model(tokens, attention_mask=mask)
    visible = torch.ones(9, 9, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    assert len(calls) == 2
    for call, k, eps in zip(calls, (2, 3.5), (0.5, 0.25), strict=True):
        key, value = (call[name].repeat_interleave(4 // call[name].shape[1], 1) for name in ("key", "value"))
        scores = call["query"] @ key.transpose(-1, -2) * 8**-0.5
        weights = reference_soft_topk(scores, k, eps, visible).weights / (k if normalise else 1)
        expected = (weights @ value).transpose(1, 2)
        close(call["output"][mask.bool()], expected[mask.bool()], 100)


def test_packed_texts_do_not_see_each_other() -> None:
    model = build("llama")
    soft_topk.use(model, k=2)
    tokens, _ = padded(12)
    places = torch.cat((torch.arange(5), torch.arange(7)))[None]
    packed = model(tokens, position_ids=places, use_cache=False).logits
    close(packed[:, :5], model(tokens[:, :5]).logits)
    close(packed[:, 5:], model(tokens[:, 5:]).logits)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_an_encoder_sees_both_ways(left: bool) -> None:
    tokens, mask = padded(9, 5, left=left)
    names = (soft_topk.NAME, "sdpa")
    ours, theirs = (build("bert", name, AutoModel)(tokens, attention_mask=mask).last_hidden_state for name in names)
    close(ours[mask.bool()], theirs[mask.bool()])


@pytest.mark.parametrize("lengths", [(9, 9), (9, 5)], ids=str)
def test_a_decoder_may_be_told_to_see_both_ways(lengths: tuple[int, int]) -> None:
    tokens, mask = padded(*lengths)
    names = (soft_topk.NAME, "sdpa")
    ours, theirs = (
        build("llama", name, is_causal=False)(tokens, attention_mask=mask, use_cache=False).logits for name in names
    )
    close(ours[mask.bool()], theirs[mask.bool()])


def test_queries_to_another_text_see_all_of_it() -> None:
    tokens, shorter = padded(9, 9)[0], padded(4, 4)[0]
    names = (soft_topk.NAME, "sdpa")
    ours, theirs = (build("bart", name, AutoModel, **BART)(tokens, decoder_input_ids=shorter)[0] for name in names)
    close(ours, theirs)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    padding=st.integers(0, 3),
    left=st.booleans(),
    cached=st.integers(0, 4),
    ahead=st.integers(0, 3),
    window=st.integers(1, 15),
    prefix=st.integers(0, 9),
    packed=st.booleans(),
    both_ways=st.booleans(),
)
def test_the_operator_sees_what_the_mask_shows_or_it_is_refused(
    lengths: list[int],
    padding: int,
    left: bool,
    cached: int,
    ahead: int,
    window: int,
    prefix: int,
    packed: bool,
    both_ways: bool,
) -> None:
    """The yardstick is the mask of SDPA, with packed texts, padding, a cache that is not full, and what is beyond the
    operator: a window, and a prefix that is seen from everywhere."""
    keys = sum(lengths) + padding
    cached = min(cached, keys - 1) * (not both_ways)
    ahead *= not both_ways
    tokens = torch.ones(1, keys, dtype=torch.bool)
    tokens[:, slice(padding) if left else slice(keys - padding, None)] = False
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    documents = nn.functional.pad(documents, (padding, ahead) if left else (0, padding + ahead), value=-1)[None]
    function: Callable[..., Any] = bidirectional_mask_function if both_ways else causal_mask_function
    if packed and not both_ways:
        function = and_masks(function, packed_sequence_mask_function(documents))
    if window < 10 and not both_ways:
        function = and_masks(function, sliding_window_overlay(window))
    if prefix > 5 and not both_ways:
        function = or_masks(function, lambda batch, head, query, key: key < prefix)
    asked = {
        "batch_size": 1,
        "q_length": keys - cached,
        "kv_length": keys + ahead,
        "q_offset": cached,
        "mask_function": function,
        "attention_mask": nn.functional.pad(tokens, (0, ahead * (prefix > 7)), value=True),
        "allow_is_causal_skip": False,
    }
    shown = sdpa_mask(**asked)
    try:
        mask = soft_topk.mask(**asked, config=None, device="cpu")
    except ConfigError:
        assert window < 10 or prefix > 5, "documents can express the rest"
        return
    query, key = torch.zeros(1, 1, keys - cached, 1), torch.zeros(1, 1, keys + ahead, 1)
    n = keys if mask is None else mask.shape[-1]
    weights = soft_topk_attention(
        query.expand(-1, -1, -1, n),
        key[:, :, :n].expand(-1, -1, -1, n),
        torch.eye(n)[None, None],
        1.0,
        causal=not both_ways,
        documents=None if mask is None else mask[:, 0, 0],
    )
    seen = nn.functional.pad(weights > 0, (0, keys + ahead - n))
    rows = tokens[0, cached:]  # what padding sees is no matter
    assert torch.equal(seen[:, :, rows], shown[:, :, rows])


def test_a_window_that_is_never_full_is_no_window() -> None:
    tokens, _ = padded(9)
    ours, theirs = (build("mistral", name, sliding_window=9)(tokens).logits for name in (soft_topk.NAME, "sdpa"))
    close(ours, theirs)
