"""A model of each family, imported from what transformers saves, has its logits; and the way back is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from cda_cli.config import ModelConfig
from cda_cli.errors import CheckpointError
from cda_cli.interchange.conversion import HEAD, to_ours, to_theirs
from cda_cli.interchange.families import FAMILIES, family_config, model_settings, plain_family
from cda_cli.model import Transformer, state_tensors
from cda_cli.runs.folder import Run
from cda_cli.transformers import use
from tests.interchange.models import (
    CLOSE,
    CONTEXT,
    MODELS,
    imported,
    llama,
    logits,
    mistral,
    randomised,
    restored,
    save,
    tokens,
)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, build = MODELS[name]
    model = randomised(build())
    save(model, tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1, "the test needs several files"
    found = imported(tmp_path / "model", tmp_path / "run")
    run = restored(tmp_path / "run")
    for length in (1, 7, CONTEXT):
        torch.testing.assert_close(logits(run.model, tokens(length)), logits(model, tokens(length)), **CLOSE)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.config == Run(tmp_path / "run").config() == run.config
    assert found.origin["architecture"] == family
    assert (run.tokenizer.separator, run.tokenizer.vocab_size) == (94, 96)
    assert run.model.attention_description == "softmax"


@pytest.mark.parametrize("name", MODELS)
def test_the_way_back_gives_the_same_model(name: str, tmp_path: Path) -> None:
    """The family, its config.json and each tensor, as transformers reads them."""
    family, build = MODELS[name]
    model = randomised(build())
    imported(save(model, tmp_path / "model"), tmp_path / "run")
    run = restored(tmp_path / "run")
    assert plain_family(run.config.model) == ("llama" if family == "mistral" else family), "it has no window"
    theirs = to_theirs(FAMILIES[family].tensors, run.config.model, state_tensors(run.model))
    before = model.state_dict()
    tied = {HEAD} if run.config.model.tied_embeddings else set()
    assert theirs.keys() == before.keys() - tied
    for key, tensor in theirs.items():
        assert torch.equal(tensor, before[key]), f"{key} has changed"
    config = family_config(family, run.config.model)
    assert config["architectures"] == [type(model).__name__]
    again = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config)).eval()
    again.load_state_dict(theirs, strict=False)
    again.tie_weights()
    torch.testing.assert_close(logits(again, tokens()), logits(model, tokens()), **CLOSE)


def test_a_file_of_the_model_without_its_head_is_read(tmp_path: Path) -> None:
    """Its names lack the prefix, as those of GPT-2 on the hub do, and the head is the token embedding."""
    model = randomised(MODELS["gpt2"][1]())
    save(model.transformer, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["GPT2Model"]
    imported(tmp_path / "model", tmp_path / "run")
    torch.testing.assert_close(logits(restored(tmp_path / "run").model, tokens()), logits(model, tokens()), **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama 3", "qwen3"])
def test_a_shorter_context_is_exact(name: str, tmp_path: Path) -> None:
    model = randomised(MODELS[name][1]())
    imported(save(model, tmp_path / "model"), tmp_path / "run", seq_len=20)
    run = restored(tmp_path / "run")
    assert run.config.model.seq_len == 20
    torch.testing.assert_close(logits(run.model, tokens(20)), logits(model, tokens(20)), **CLOSE)


def test_a_context_within_the_window_is_exact(tmp_path: Path) -> None:
    model = randomised(mistral(sliding_window=16))
    imported(save(model, tmp_path / "model"), tmp_path / "run", seq_len=16)
    torch.testing.assert_close(logits(restored(tmp_path / "run").model, tokens(16)), logits(model, tokens(16)), **CLOSE)


def test_half_precision_is_read_as_it_is(tmp_path: Path) -> None:
    source = save(randomised(llama()).to(torch.bfloat16), tmp_path / "model")
    imported(source, tmp_path / "run")
    run = restored(tmp_path / "run")
    assert {tensor.dtype for tensor in state_tensors(run.model).values()} == {torch.float32}
    model = transformers.LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(run.model, tokens()), logits(model, tokens()), **CLOSE)


@pytest.mark.parametrize("options", [{"attn_k": 1.0}, {"attn_eps": 1.0}])
def test_soft_top_k_of_one_is_softmax(options: dict[str, float], tmp_path: Path) -> None:
    model = randomised(llama())
    imported(save(model, tmp_path / "model"), tmp_path / "run", **options)
    run = restored(tmp_path / "run")
    assert run.config.model.attention == "coordinate-descent"
    torch.testing.assert_close(logits(run.model, tokens()), logits(model, tokens()), **CLOSE)


def test_the_weights_of_soft_top_k_sum_to_one_as_those_of_softmax(tmp_path: Path) -> None:
    """Where all values are one, the attention is that value, whatever the rule: the swap then costs nothing."""
    model = randomised(llama(attention_bias=True))
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
    source, expected = save(model, tmp_path / "model"), logits(model, tokens())
    imported(source, tmp_path / "run", attn_k=4.0, attn_eps=0.5)
    found = logits(restored(tmp_path / "run").model, tokens())
    torch.testing.assert_close(found[:, 3:], expected[:, 3:], **CLOSE)  # earlier queries see fewer keys than k
    imported(source, tmp_path / "inflated", attn_k=4.0, attn_eps=0.5, sets=["model.normalise=none"])
    inflated = logits(restored(tmp_path / "inflated").model, tokens())
    assert (inflated - expected)[:, 3:].abs().max() > 0.1, "the test would pass without the division"


def sizes(family: str) -> dict[str, Any]:
    """The settings that models of a family have in common."""
    said = model_settings({"model_type": family, **_config(family)})
    return {name: said[name] for name in FAMILIES[family].fixed} | {"ff": said["ff"], "attention": "softmax"}


def _config(family: str) -> dict[str, Any]:
    return {key: 8 for key in FAMILIES[family].keys.values() if key != "tie_word_embeddings"} | {"sliding_window": None}


@settings(max_examples=25)
@given(st.data())
def test_any_model_of_a_family_goes_there_and_back(data: st.DataObject) -> None:
    """No tensor and no setting is lost or changed, whatever the sizes are."""
    family = data.draw(st.sampled_from(sorted(FAMILIES)))
    grouped = family != "gpt2"
    kv_heads = data.draw(st.integers(1, 3))
    heads = kv_heads * (data.draw(st.integers(1, 3)) if grouped else 1)
    width = 2 * data.draw(st.integers(1, 3))
    scaling = data.draw(st.sampled_from(["none", "llama3", "yarn"])) if grouped else "none"
    config = ModelConfig(
        **sizes(family) | ({"kv_heads": kv_heads, "dim_head": width} if grouped else {}),
        vocab_size=data.draw(st.integers(2, 9)),
        seq_len=data.draw(st.integers(2, 9)),
        dim=data.draw(st.integers(1, 9)) if grouped else heads * width,
        depth=data.draw(st.integers(1, 2)),
        heads=heads,
        ff_width=data.draw(st.integers(1, 9)),
        tied_embeddings=data.draw(st.booleans()),
        norm_eps=data.draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        rotary_scaling=scaling,
        rotary_factor=1.0 if scaling == "none" else data.draw(st.sampled_from([1.0, 4.0])),
        rotary_attention_factor=None if scaling != "yarn" else data.draw(st.sampled_from([None, 1.5])),
    )
    ours = state_tensors(Transformer(config))
    found = plain_family(config)
    assert found is not None
    theirs = to_theirs(FAMILIES[found].tensors, config, ours)
    again = ModelConfig(**model_settings(json.loads(json.dumps(family_config(found, config)))))
    readers = {name: (lambda tensor=tensor: tensor) for name, tensor in theirs.items()}
    back = dict(to_ours(FAMILIES[found].tensors, again, readers))
    assert back.keys() == ours.keys()
    for name, tensor in back.items():
        assert torch.equal(tensor, ours[name]), f"{name} has changed"


@pytest.mark.parametrize(
    "setting",
    [
        {"attention": "coordinate-descent"},
        {"null_kv": 1},
        {"output_gate": True},
        {"position": "none"},
        {"nope_layers": [0]},
        {"ff": "relu2"},
        {"norm": "layernorm"},
        {"ff_bias": True, "attn_bias": "qkv"},
    ],
)
def test_a_model_that_is_more_than_a_family_has_none(setting: dict[str, Any]) -> None:
    plain = ModelConfig(**sizes("llama"))
    assert plain_family(plain) == "llama"
    assert plain_family(ModelConfig(**sizes("llama") | setting)) is None


@pytest.mark.parametrize("normalise", [True, False])
def test_a_model_that_uses_the_operator_keeps_it(normalise: bool, tmp_path: Path) -> None:
    """As softmax, it would be another model. A k for each layer is one that we cannot have."""
    model = randomised(llama())
    use(model, k=2.5, eps=0.5, normalise=normalise)
    imported(save(model, tmp_path / "model"), tmp_path / "run")
    run = restored(tmp_path / "run")
    torch.testing.assert_close(logits(run.model, tokens()), logits(model, tokens()), **CLOSE)
    use(model, k=[2.0, 3.0])
    with pytest.raises(CheckpointError, match="has a k for each layer"):
        imported(save(model, tmp_path / "other"), tmp_path / "refused")
