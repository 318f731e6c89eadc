"""The layers are those of GPT-2, Llama, Qwen and SmolLM3, by the modules of transformers with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, SmolLM3Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
from transformers.models.smollm3.modeling_smollm3 import SmolLM3Attention

from cda_cli.config import ModelConfig
from cda_cli.model.attention import Attention
from cda_cli.model.feed_forward import FeedForward
from cda_cli.model.layers import make_norm
from cda_cli.model.rotary import RotaryPositions
from tests.model.cases import build, tiny, tokens

SHAPE: dict[str, Any] = {"hidden_size": 12, "num_attention_heads": 4, "head_dim": 6, "attn_implementation": "sdpa"}
OURS: dict[str, Any] = {
    "dim": 12, "heads": 4, "dim_head": 6, "seq_len": 40, "position": "rotary", "rotary_base": 500.0,
}  # fmt: skip
# The configuration of transformers, its attention, and our settings.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[nn.Module], dict[str, Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaAttention, {}, {}),
    "llama with biases": (LlamaConfig, LlamaAttention, {"attention_bias": True}, {"attn_bias": "all"}),
    "qwen2": (Qwen2Config, Qwen2Attention, {}, {"attn_bias": "qkv"}),
    "qwen3": (Qwen3Config, Qwen3Attention, {"rms_norm_eps": 1e-2}, {"qk_norm": True, "norm_eps": 1e-2}),
    "smollm3": (SmolLM3Config, SmolLM3Attention, {"no_rope_layers": [0, 1]}, {"nope_layers": [0]}),
}
SCALINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({"rope_type": "default"}, {}),
    "llama3": (
        {
            "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 20, "low_freq_factor": 1.5,
            "high_freq_factor": 3.0,
        },
        {
            "rotary_scaling": "llama3", "rotary_factor": 4.0, "rotary_original_len": 20, "rotary_low_freq_factor": 1.5,
            "rotary_high_freq_factor": 3.0,
        },
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20, "beta_fast": 3.0},
        {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_len": 20, "rotary_beta_fast": 3.0},
    ),
}  # fmt: skip


def copy(ours: Attention, theirs: nn.Module) -> None:
    """Gives `ours` the weights of `theirs`, which packs nothing."""
    inputs = [getattr(theirs, name) for name in ("q_proj", "k_proj", "v_proj")]
    state = {"to_qkv.weight": torch.cat([one.weight for one in inputs]), "to_out.weight": theirs.o_proj.weight}
    if inputs[0].bias is not None:
        state["to_qkv.bias"] = torch.cat([one.bias for one in inputs])
    if theirs.o_proj.bias is not None:
        state["to_out.bias"] = theirs.o_proj.bias
    if hasattr(theirs, "q_norm"):
        state |= {"query_norm.weight": theirs.q_norm.weight, "key_norm.weight": theirs.k_norm.weight}
    ours.load_state_dict(state | {"null_kv": ours.null_kv})


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=6)
@given(key_heads=st.sampled_from([1, 2, 4]), T=st.integers(1, 30), soft=st.booleans())
def test_attention_is_that_of_its_family(family: str, scaling: str, key_heads: int, T: int, soft: bool) -> None:
    """Output and gradient, by softmax, and by the soft top-k with k = 1 and ε = 1, which is softmax."""
    their_config, their_class, their_settings, our_settings = FAMILIES[family]
    parameters, rotary = SCALINGS[scaling]
    torch.manual_seed(T)
    theirs = their_class(
        their_config(
            **SHAPE, **their_settings, num_key_value_heads=key_heads, num_hidden_layers=2, max_position_embeddings=40,
            rope_parameters={"rope_theta": 500.0, **parameters},
        ),
        0,
    )  # fmt: skip
    for name, parameter in theirs.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name), std=0.5)
    rule = {"attention": "coordinate-descent", "attn_k": 1.0, "attn_eps": 1.0} if soft else {"attention": "softmax"}
    ours = Attention(tiny(**OURS, **our_settings, **rotary, **rule, kv_heads=key_heads), 0, "auto")
    copy(ours, theirs)
    x, gradient = torch.randn(2, 2, T, 12)
    angles = LlamaRotaryEmbedding(theirs.config)(x, torch.arange(T)[None])
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = ours(leaf), theirs(other, angles, None)[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    grads = [torch.autograd.grad(*pair, gradient)[0] for pair in ((found, leaf), (expected, other))]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


@settings(max_examples=60)
@given(
    scaling=st.sampled_from(["llama3", "yarn"]),
    half=st.integers(1, 64),
    base=st.floats(10, 1e6),
    factor=st.floats(1, 64),
    trained_len=st.integers(8, 2**15),
    bounds=st.tuples(st.floats(0.5, 8), st.floats(1, 40)).map(lambda pair: (pair[0], sum(pair))),
    attention_factor=st.none() | st.floats(0.5, 2),
)
def test_scaled_rotary_positions_are_those_of_transformers(
    scaling: str,
    half: int,
    base: float,
    factor: float,
    trained_len: int,
    bounds: tuple[float, float],
    attention_factor: float | None,
) -> None:
    """The sines of position 1 show each frequency, those of position 49 show that it is used.

    transformers computes the frequencies in float32. Between the bounds a rounding counts up to 9 times, as the bounds
    differ by at least 1 and the lower one is at most 8: 49 · 4 roundings · 9 · 2⁻²⁴ < 2e-4.
    """
    low, high = bounds
    parameters: dict[str, Any] = {
        "rope_type": scaling, "rope_theta": base, "factor": factor, "original_max_position_embeddings": trained_len,
    }  # fmt: skip
    given_bounds = {"low_freq_factor": low, "high_freq_factor": high} if scaling == "llama3" else {}
    if scaling == "yarn":
        given_bounds = {"beta_slow": low, "beta_fast": high, "attention_factor": attention_factor}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=2 * half, num_attention_heads=1, head_dim=2 * half, max_position_embeddings=2**21,
            rope_parameters=parameters | given_bounds,
        )
    )  # fmt: skip
    config = ModelConfig(
        dim_head=2 * half, seq_len=50, position="rotary", rotary_base=base, rotary_scaling=scaling,
        rotary_factor=factor, rotary_original_len=trained_len,
        **{f"rotary_{name}": value for name, value in given_bounds.items()},
    )  # fmt: skip
    ours = RotaryPositions(config)
    places = torch.tensor([0, 1, 49])
    cos, sin = (table[0] for table in theirs(torch.zeros(1), places[None]))
    torch.testing.assert_close(ours.cos[places], cos, atol=2e-4, rtol=0)
    torch.testing.assert_close(ours.sin[places][:, half:], sin[:, half:], atol=2e-4, rtol=0)
    torch.testing.assert_close(-ours.sin[places][:, :half], sin[:, :half], atol=2e-4, rtol=0)
    torch.testing.assert_close(ours.sin[1, half:], sin[1, half:], atol=0, rtol=1e-4)


def test_the_original_length_is_the_context_where_none_is_given() -> None:
    scaled: dict[str, Any] = {"dim_head": 16, "seq_len": 50, "rotary_scaling": "yarn", "rotary_factor": 4.0}
    assert RotaryPositions(tiny(**scaled)).cos.equal(RotaryPositions(tiny(**scaled, rotary_original_len=50)).cos)


def test_the_feed_forward_is_that_of_gpt2() -> None:
    """It has biases, and the tanh form of GELU. The matrices of GPT-2 lie the other way."""
    torch.manual_seed(0)
    theirs = GPT2MLP(31, GPT2Config(n_embd=12, resid_pdrop=0.0))
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = FeedForward(tiny(ff="gelu-tanh", ff_width=31), 0, "auto")
    ours.load_state_dict(
        {
            "proj_in.weight": theirs.c_fc.weight.T, "proj_in.bias": theirs.c_fc.bias,
            "proj_out.weight": theirs.c_proj.weight.T, "proj_out.bias": theirs.c_proj.bias,
        }
    )  # fmt: skip
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-5)


def test_the_feed_forward_is_that_of_llama() -> None:
    """It has no biases, and a number of units that is no multiple of the width."""
    torch.manual_seed(0)
    theirs = LlamaMLP(LlamaConfig(hidden_size=12, num_attention_heads=1, intermediate_size=31))
    ours = FeedForward(tiny(ff="swiglu", ff_width=31, ff_bias=False), 0, "auto")
    names = {"proj_in": "up_proj", "proj_out": "down_proj", "proj_gate": "gate_proj"}
    ours.load_state_dict({f"{name}.weight": getattr(theirs, other).weight for name, other in names.items()})
    x = torch.randn(2, 7, 12)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("eps", [None, 0.3])
def test_the_norms_add_the_number_that_is_asked_for(eps: float | None) -> None:
    """Without one they are as they always were: 1e-5 for LayerNorm, 1e-6 for RMSNorm."""
    x = 1e-3 * torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(0))
    for norm, theirs in (("layernorm", nn.LayerNorm(12, eps or 1e-5)), ("rmsnorm", LlamaRMSNorm(12, eps or 1e-6))):
        torch.testing.assert_close(make_norm(tiny(norm=norm, norm_eps=eps))(x), theirs(x), atol=1e-7, rtol=1e-5)


def test_untied_logits_without_a_bias_are_those_with_a_bias_of_0() -> None:
    biased, plain = build(tiny()), build(tiny(logits_bias=False))
    state = biased.state_dict()
    bias = state.pop("to_logits.bias")
    plain.load_state_dict(state)
    batch = tokens(tiny())
    torch.testing.assert_close(plain(batch), biased(batch) - bias, atol=1e-5, rtol=0)


def test_a_model_without_positions_sees_a_set_of_earlier_tokens() -> None:
    """Its last logits stay where the tokens before it change places; with rotary positions they do not."""
    batch = tokens(tiny(), 1)
    swapped = torch.cat((batch[:, :-1].flip(1), batch[:, -1:]), 1)
    layouts = ({"position": "none"}, {"position": "rotary", "nope_layers": [0]}, {"position": "rotary"})
    found = []
    for layout in layouts:
        model = build(tiny(**layout, depth=1, attention="softmax"))
        found.append((model(swapped)[:, -1] - model(batch)[:, -1]).abs().max().item())
    assert found[0] < 1e-6
    assert found[1] < 1e-6, "a layer that is to have no positions has some"
    assert found[2] > 1e-4


def test_an_output_divided_by_k_is_an_average() -> None:
    """A row of which no weight is capped is softmax(s/ε); a row of a capped one is the sum, divided by k."""
    settings: dict[str, Any] = {"attn_k": 1.5, "attn_eps": 1.0, "depth": 1}
    x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
    layers = {
        name: build(tiny(**settings, **more)).each_block()[0].attention
        for name, more in {
            "sum": {}, "average": {"normalise": "k"}, "softmax": {"attention": "tempered-softmax", "normalise": "k"},
        }.items()
    }  # fmt: skip
    sums, averages, softmax = (layer(x) for layer in layers.values())
    torch.testing.assert_close(averages, sums / 1.5, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(averages[:, 4:], softmax[:, 4:], atol=1e-6, rtol=1e-5)
    assert (averages[:, 0] - softmax[:, 0]).abs().max() > 1e-3, "the first row sees one key, and its k is 1.5"


def test_a_normalised_output_without_a_budget_is_warned_of() -> None:
    model = build(tiny(attention="softmax", normalise="k"))
    assert model.attention_rule.warnings() == ["normalise has no effect with softmax attention, whose rows sum to 1"]
    assert build(tiny(normalise="k")).attention_rule.warnings() == []
