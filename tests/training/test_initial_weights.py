"""What a new model takes over from the weights of another, by what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cda_cli.config import ModelConfig, parse
from cda_cli.errors import ConfigError
from cda_cli.model import Transformer, load_state_tensors, state_tensors
from cda_cli.training.initial_weights import by_layers, carry_over

SIZES: dict[str, Any] = {"vocab_size": 11, "seq_len": 8, "dim": 8, "depth": 2, "heads": 2}


def settings(**changes: object) -> ModelConfig:
    return parse({"model": SIZES | changes}).model


def started(source: Transformer, config: ModelConfig) -> tuple[Transformer, list[str], list[str]]:
    """The model of `config` with what carries over, and the names of what is new in it and of what it dropped."""
    model = Transformer(config)
    carried = carry_over(state_tensors(source), source.config, config)
    load_state_tensors(model, state_tensors(model) | carried.tensors)
    return model, carried.new, carried.dropped


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"position": "rotary"}, {"position": "rotary", "seq_len": 20}),
        ({"position": "learned"}, {"position": "learned", "seq_len": 5}),
        ({"position": "rotary", "kv_heads": 1}, {"position": "rotary", "kv_heads": 1, "seq_len": 20}),
        ({"tied_embeddings": True}, {"tied_embeddings": True, "solver": "iterative", "n_iters": 100, "eps_decay": 0.5}),
        ({"attention": "softmax"}, {"attention": "coordinate-descent", "attn_k": 1.0, "attn_eps": 1.0}),
        (
            {"attention": "tempered-softmax", "attn_eps": 0.5, "output_gate": True, "attn_k": 3.0},
            {"attention": "hard-topk", "attn_eps": 0.5, "output_gate": True, "attn_k": 5.0, "output_gate_max": 3.0},
        ),
    ],
    ids=["a longer context", "a shorter context", "fewer key heads", "another solver", "another rule", "all top keys"],
)
def test_the_new_model_computes_the_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Where the settings leave the function as it is, the weights do so too."""
    source = Transformer(settings(**before))
    model, new, dropped = started(source, settings(**now))
    tokens = torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))
    assert not new
    assert not dropped
    torch.testing.assert_close(model(tokens), source(tokens), rtol=0, atol=1e-5)


def test_a_longer_context_needs_rotary_positions() -> None:
    with pytest.raises(ConfigError, match="--seq-len 8 or less, as only rotary positions"):
        carry_over(state_tensors(Transformer(settings())), settings(), settings(seq_len=9))


def test_what_only_one_of_the_models_has_is_named() -> None:
    source = Transformer(settings(norm="layernorm", depth=3))
    _, new, dropped = started(source, settings(norm="rmsnorm", qk_norm=True, position="rotary"))
    assert by_layers(new) == "blocks.0–1.attention.query_norm.weight, blocks.0–1.attention.key_norm.weight"
    assert "position_embedding.weight" in dropped
    assert "norm.bias" in dropped
    assert "blocks.2.attention.to_qkv.weight" in by_layers(dropped)
    assert "blocks.0–2.attention_norm.bias" in by_layers(dropped)


def test_null_keys_come_and_go() -> None:
    with_null, without = settings(null_kv=2), settings(null_kv=0)
    names = [f"blocks.{layer}.attention.null_kv" for layer in range(2)]
    assert started(Transformer(without), with_null)[1:] == (names, [])
    assert started(Transformer(with_null), without)[1:] == ([], names)


@pytest.mark.parametrize("changes", [{"heads": 4}, {"heads": 1}, {"heads": 4, "null_kv": 1}])
def test_heads_that_cut_the_same_weights_differently_are_refused(changes: dict[str, Any]) -> None:
    """Their matrices have the same shapes, and another meaning."""
    now = settings(**changes)
    with pytest.raises(ConfigError, match=r"model\.heads and model\.dim_head"):
        carry_over(state_tensors(Transformer(settings())), settings(), now)
