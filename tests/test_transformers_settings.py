"""What is set for a model of transformers stays with it, and what the operator cannot do is refused."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

import cda_cli.transformers as soft_topk
from cda_cli.errors import ConfigError
from tests.transformers_models import BART, SIZES, build, close, padded


def test_settings_are_saved_and_come_back(tmp_path: Path) -> None:
    model = build("llama", dtype=torch.float32)
    soft_topk.use(model, k=[2, 3], eps=0.5, normalise=False, solver="iterative", n_iters=7)
    tokens, _ = padded(9)
    expected = model(tokens).logits
    for place in (tmp_path / "first", tmp_path / "second"):  # saved again as it was loaded, before any forward
        model.save_pretrained(place)
        model = AutoModelForCausalLM.from_pretrained(place).eval()
    assert model.config.soft_topk["k"] == [2, 3]
    assert torch.equal(model(tokens).logits, expected)


def test_settings_of_a_part_are_saved_with_the_whole(tmp_path: Path) -> None:
    """The configuration of the whole, which has none, must not reset that of its part."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    text = {**SIZES, "model_type": "llama"}
    layers = {"num_hidden_layers": 3, "image_size": 4, "patch_size": 2}
    model = build("llava", "sdpa", AutoModelForImageTextToText, vision_config=vision | layers, text_config=text)
    tokens, _ = padded(9)
    soft_topk.use(model.model.language_model, k=2)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert again.config.text_config._attn_implementation == "soft_topk"
    assert again.config.vision_config._attn_implementation == "sdpa"
    close(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_without_this_module_a_saved_model_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its config.json names the implementation, so that nothing runs it as softmax unawares."""
    model = build("llama")
    soft_topk.use(model, k=2)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attn_implementation"] == "soft_topk"
    monkeypatch.delitem(AttentionInterface._global_mapping, soft_topk.NAME)
    with pytest.raises(ValueError, match="soft_topk"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_with_settings_runs_with_no_other_attention(tmp_path: Path) -> None:
    model = build("llama")
    soft_topk.use(model, k=2)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"k = 2.* would ignore"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    with pytest.raises(ConfigError, match=r"k = 2.* would ignore"):
        model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "soft_topk"
    del model.config.soft_topk
    model.set_attn_implementation("sdpa")
    tokens, _ = padded(9)
    close(model(tokens).logits, build("llama", "sdpa")(tokens).logits)


def test_settings_are_of_one_model() -> None:
    first, second = build("llama"), build("llama")
    soft_topk.use(first, k=2)
    tokens, _ = padded(9)
    close(second(tokens).logits, build("llama", "sdpa")(tokens).logits)
    assert not torch.allclose(first(tokens).logits, second(tokens).logits)


def test_settings_can_change_from_step_to_step() -> None:
    model, tokens = build("llama"), padded(9)[0]
    before = model(tokens).logits
    soft_topk.use(model, k=4, eps=0.1)
    soft_topk.use(model, k=1, eps=1)
    assert torch.equal(model(tokens).logits, before)


def test_continuous_batching_is_refused() -> None:
    """It has no masks. Where flash attention is installed it would change to that, which a model's settings refuse."""
    model = build("llama")
    soft_topk.use(model, k=2)
    with pytest.raises((ValueError, ConfigError), match="soft_topk"):
        model.generate_batch([[1, 2, 3]])


def hole(model: Any, tokens: Tensor) -> Any:
    mask = torch.ones_like(tokens)
    mask[:, 4] = 0
    return model(tokens, attention_mask=mask)


def train(model: Any, tokens: Tensor) -> Any:
    return model.train()(tokens)


REFUSED: dict[str, tuple[str, dict[str, Any], Callable[[Any, Tensor], Any], str]] = {
    "a window": ("mistral", {"sliding_window": 8}, lambda model, tokens: model(tokens), "masks some"),
    "dropout": ("llama", {"attention_dropout": 0.1}, train, "no dropout.*attention_dropout=0.0"),
    "GPT-2's dropout": ("gpt2", {"attn_pdrop": 0.1}, train, "no dropout.*attn_pdrop=0.0"),
    "sinks": ("gpt_oss", {}, lambda model, tokens: model(tokens), "sinks"),
    "a soft cap": ("gemma2", {}, lambda model, tokens: model(tokens), "soft cap"),
    "a bias": (
        "t5",
        {"d_kv": 8, "d_ff": 32},
        lambda model, tokens: model(tokens, decoder_input_ids=tokens),
        "a bias on the scores",
    ),
    "padding of another text": (
        "bart",
        BART,
        lambda model, tokens: model(tokens, attention_mask=padded(9, 5)[1], decoder_input_ids=tokens[:, :4]),
        "another text takes no padding",
    ),
    "a ready mask": (
        "llama",
        {},
        lambda model, tokens: model(tokens, attention_mask=torch.ones(2, 1, 9, 9).tril().bool()),
        "ready mask",
    ),
    "padding between tokens": ("llama", {}, hole, "between tokens; pad on the left"),
    "weights": ("llama", {}, lambda model, tokens: model(tokens, output_attentions=True), "output_attentions"),
    "packed by lengths": (
        "llama",
        {},
        lambda model, tokens: model(tokens, cu_seq_lens_q=torch.tensor([0, 4, 9])),
        "cu_seq_lens_q",
    ),
    "an attention of its own": ("bloom", {}, lambda model, tokens: model(tokens), "has its own attention"),
}


@pytest.mark.parametrize(("kind", "settings", "call", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_operator_cannot_do_is_refused(
    kind: str, settings: dict[str, Any], call: Callable[[Any, Tensor], Any], reason: str
) -> None:
    factory = AutoModel if kind in ("bart", "t5") else AutoModelForCausalLM
    model = build(kind, factory=factory, **settings)
    with pytest.raises(ConfigError, match=reason):
        call(model, padded(9, 9)[0])


def test_more_keys_than_queries_need_a_mask() -> None:
    """Without one the queries may be the first or the last; a model that makes no masks would get either, silently."""
    query, key = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 5, 8)
    with pytest.raises(ConfigError, match="3 queries, 5 keys and no mask"):
        soft_topk.attention(nn.Identity(), query, key, key, None)


def test_dropout_is_no_matter_without_training() -> None:
    model = build("llama", attention_dropout=0.1)
    assert model(padded(9)[0]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"k": 0}, "sparsity_k must be greater than 0"),
        ({"k": float("inf")}, "k must be finite"),
        ({"backend": "cuda"}, "backend must be one of auto"),
        ({"k": "2"}, "sparsity_k must be a number"),
        ({"k": [1, 2, 3]}, "one for each of 2 layers, not 3"),
        ({"eps": [0.5, -1]}, "eps must be greater than 0"),
        ({"normalise": 1}, "normalise must be True or False"),
        ({"solver": "newton"}, "newton"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, Any], reason: str) -> None:
    model = build("llama", "sdpa")
    with pytest.raises(ConfigError, match=reason):
        soft_topk.use(model, **settings)
    assert model.config._attn_implementation == "sdpa", "a refusal changes nothing"


def test_layers_that_do_not_know_their_place_take_no_list() -> None:
    model = build("clip_text_model", factory=AutoModel)
    soft_topk.use(model, k=[2, 3])
    with pytest.raises(ConfigError, match="no list for the layers of CLIPAttention"):
        model(padded(9)[0])


def test_damaged_saved_settings_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    soft_topk.use(model, k=2)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"n_iters"', '"iterations"'))
    with pytest.raises(ConfigError, match=re.escape("unknown soft_topk settings: ['iterations']")):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"soft_topk": 2}))
    with pytest.raises(ConfigError, match="must hold settings by name, not 2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["xlm", "bloom"])
def test_a_model_with_an_attention_of_its_own_gets_no_settings(kind: str) -> None:
    with pytest.raises(ConfigError, match="has its own attention"):
        soft_topk.use(build(kind, "eager"), k=2)


def test_settings_are_for_models_of_transformers() -> None:
    with pytest.raises(ConfigError, match="Linear holds none"):
        soft_topk.use(nn.Linear(2, 2))


def test_a_module_that_holds_a_model_is_set() -> None:
    holder = nn.ModuleDict({"inner": build("llama", "sdpa")})
    soft_topk.use(holder, k=2)
    assert holder["inner"].config.soft_topk["k"] == 2


def test_without_transformers_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cda_cli.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=re.escape("pip install transformers")):
        importlib.import_module("cda_cli.transformers")


def test_an_old_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "cda_cli.transformers")
    monkeypatch.setattr("transformers.__version__", "5.3.0")
    with pytest.raises(ConfigError, match=r"5\.4 or later, and this is 5\.3\.0"):
        importlib.import_module("cda_cli.transformers")
