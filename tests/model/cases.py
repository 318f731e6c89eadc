"""Models that together have every setting, and every combination of any three settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.model import Transformer
from cda_cli.model.length_scaling import AdaptiveScaling

# Each option has two sides, and settings with little to do with each other share one. The sizes
# are such that nothing hides: T is no multiple of anything, heads ≠ head width.
OPTIONS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"attention": "softmax"}, {"attention": "coordinate-descent"}),
    ({"learned_k": False}, {"learned_k": True}),
    ({"output_gate": False}, {"output_gate": True}),
    ({"null_kv": 0}, {"null_kv": 2, "kv_heads": 1}),
    ({"position": "learned"}, {"position": "rotary", "nope_layers": [1]}),
    ({"norm": "layernorm"}, {"norm": "rmsnorm", "norm_eps": 1e-3}),
    ({"qk_norm": False}, {"qk_norm": True}),
    ({"tied_embeddings": False, "logits_bias": False}, {"tied_embeddings": True}),
    ({"ff": "gelu", "ff_bias": False}, {"ff": "coordinate-descent", "ff_width": 25}),
    ({"solver": "exact", "attn_bias": "all"}, {"solver": "iterative"}),
    ({"dropout": 0.0}, {"dropout": 0.2}),
    ({}, {"dim_head": 6, "normalise": "k"}),
)
# Models of other toolkits, with two key heads of four.
FAMILIES: tuple[dict[str, Any], ...] = (
    {"position": "learned", "ff": "gelu-tanh", "attn_bias": "all", "tied_embeddings": True, "attention": "softmax"},
    {
        "position": "rotary", "rotary_scaling": "llama3", "rotary_factor": 4.0, "rotary_original_len": 8,
        "norm": "rmsnorm", "norm_eps": 1e-5, "ff": "swiglu", "ff_width": 31, "ff_bias": False, "logits_bias": False,
        "attention": "softmax", "heads": 4, "kv_heads": 2, "dim_head": 8,
    },
    {
        "position": "rotary", "rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_len": 8,
        "nope_layers": [0], "norm": "rmsnorm", "qk_norm": True, "ff": "swiglu", "heads": 4, "kv_heads": 2,
        "dim_head": 8, "attention": "coordinate-descent", "normalise": "k",
    },
    {
        "position": "nape", "length_scaling": "log-n", "heads": 4, "kv_heads": 2, "dim_head": 8, "null_kv": 2,
        "attention": "entmax", "qk_norm": True,
    },
    {
        "position": "nape", "length_scaling": "adaptive", "heads": 4, "dim_head": 7, "null_kv": 1, "learned_k": True,
        "attention": "coordinate-descent", "solver": "iterative", "output_gate": True,
    },
)  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 23,
    "seq_len": 11,
    "dim": 12,
    "depth": 2,
    "heads": 3,
    "ff_mult": 2.0,
    "attn_k": 2.5,
    "attn_eps": 0.3,
    "learned_k_bias": -0.5,
    "ff_k": 5.0,
    "ff_eps": 0.3,
    "ff_block_size": 4,
}


def tiny(**settings: Any) -> ModelConfig:
    return ModelConfig(**{**TINY, **settings})


def table() -> list[list[int]]:
    """Returns 24 rows of twelve 0s and 1s, in which any three columns hold each of the eight patterns three times.

    They are a Hadamard matrix of order 12 above its negative (Plackett and Burman, 1946, folded over).
    """
    first = [1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 0]
    half = [[1, *first[shift:], *first[:shift]] for shift in range(11)] + [[1] + [0] * 11]
    return half + [[1 - entry for entry in row] for row in half]


def cases() -> list[ModelConfig]:
    """Returns a model for each row of the table, and the families."""
    chosen = []
    for row in table():
        settings: dict[str, Any] = {}
        for sides, side in zip(OPTIONS, row, strict=True):
            settings |= sides[side]
        chosen.append(tiny(**settings))
    return [*chosen, *(tiny(**settings) for settings in FAMILIES)]


def name(config: ModelConfig) -> str:
    """Names a test after what differs from the plainest model."""
    plain = tiny(**{key: value for first, _ in OPTIONS for key, value in first.items()})
    changed = {key: value for key, value in config.model_dump().items() if value != getattr(plain, key)}
    return ",".join(key if value is True else f"{key}={value}" for key, value in changed.items()) or "plain"


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """Builds a model in evaluation mode, with weights so large that each of its parts shows in the logits."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    if config.tied_embeddings:
        torch.nn.init.normal_(model.token_embedding.weight, std=0.5)
    for module in model.modules():
        if isinstance(module, AdaptiveScaling):
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens(config: ModelConfig, batch: int = 2, length: int | None = None, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, length or config.seq_len), generator=generator)
