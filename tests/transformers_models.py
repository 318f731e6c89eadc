"""Small random models of transformers, and tokens for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import cda_cli.transformers as soft_topk

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # so that attention is far from uniform
    "bos_token_id": None,
    "eos_token_id": None,  # generation goes on to its full length
    "pad_token_id": 0,
}
OWN_KEYS = {key: size for key, size in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
# Decoders by the name of their kind: settings beside the usual ones.
DECODERS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3": SIZES,
    "mistral": {**SIZES, "sliding_window": None},
    "gemma": SIZES,
    "gpt_neox": OWN_KEYS,
    "gpt2": {**OWN_KEYS, **NO_DROPOUT},
}
# An encoder-decoder's.
BART: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
# Eager attention rounds its weights to float32, and has a NaN for padding in float64.
DTYPES = {"sdpa": torch.float64, "eager": torch.float32}
ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-5}


def build(
    kind: str,
    attention: str = soft_topk.NAME,
    factory: Any = AutoModelForCausalLM,
    dtype: torch.dtype = torch.float64,
    **settings: Any,
) -> Any:
    """The same random model each time, with the attention of that name."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**DECODERS.get(kind, SIZES), **settings})
    return factory.from_config(config, attn_implementation=attention, dtype=dtype).eval()


def padded(*lengths: int, seed: int = 0, left: bool = True) -> tuple[Tensor, Tensor]:
    """Random tokens [B, max(lengths)] and their mask of ones, with padding on one side."""
    width, generator = max(lengths), torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 61, (len(lengths), width), generator=generator)
    places = torch.arange(width).expand_as(tokens)
    sizes = torch.tensor(lengths)[:, None]
    mask = (places >= width - sizes if left else places < sizes).long()
    return tokens * mask, mask


def close(actual: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Compares within the rounding of the dtype, relative to the largest number."""
    tolerance = factor * ROUNDING[expected.dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
