"""Rotary positions: the keys of config.json, of transformers 5 (`rope_parameters`) and before, and our settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cda_cli.config import ModelConfig
from cda_cli.errors import CheckpointError

# Our settings, and the keys of `rope_parameters`, of each scaling.
ROPE_KEYS: dict[str, dict[str, str]] = {
    "none": {},
    "llama3": {
        "rotary_factor": "factor",
        "rotary_original_len": "original_max_position_embeddings",
        "rotary_low_freq_factor": "low_freq_factor",
        "rotary_high_freq_factor": "high_freq_factor",
    },
    "yarn": {
        "rotary_factor": "factor",
        "rotary_original_len": "original_max_position_embeddings",
        "rotary_beta_fast": "beta_fast",
        "rotary_beta_slow": "beta_slow",
        "rotary_attention_factor": "attention_factor",
    },
}
DEFAULT_BASE = 10_000.0


def rotary_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the rotary positions. Raises CheckpointError for positions of another kind."""
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = "none" if kind == "default" else kind
    if scaling not in ROPE_KEYS:
        raise CheckpointError(f"cda has no rotary positions of the type {kind!r}; give a model with llama3 or yarn")
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share != 1 or not rope.get("truncate", True):
        raise CheckpointError(
            "the model rotates only a part of each head, or in YaRN without whole bounds, which cda does not; give "
            "another model"
        )
    base = rope.get("rope_theta", config.get("rope_theta", DEFAULT_BASE))
    settings = {"rotary_scaling": scaling, "rotary_base": float(base)}
    given = {name: rope[key] for name, key in ROPE_KEYS[scaling].items() if rope.get(key) is not None}
    if scaling != "none":
        longest = config["max_position_embeddings"]
        given.setdefault("rotary_original_len", longest)
        given.setdefault("rotary_factor", longest / given["rotary_original_len"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        given.setdefault(
            "rotary_attention_factor", _mscale(given, rope["mscale"]) / _mscale(given, rope["mscale_all_dim"])
        )
    return settings | given


def _mscale(given: Mapping[str, Any], weight: float) -> float:
    """YaRN's factor on queries and keys (arXiv 2309.00071, equation 22), with a weight of its logarithm."""
    return 0.1 * weight * math.log(given["rotary_factor"]) + 1


def llama3_scaling(factors: Sequence[float], base: float) -> dict[str, Any] | None:
    """The keys of the scaling of Llama 3 that divides the frequency of each pair by its factor; None for another.

    The models of Meta differ in the largest factor alone.
    """
    keys = {"factor": round(max(factors), 4), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    length = 8192
    for pair, factor in enumerate(factors):
        turns = length * base ** (-pair / len(factors)) / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - 1.0) / 3.0))
        if not math.isclose(factor, 1 / ((1 - share) / keys["factor"] + share), rel_tol=1e-4):
            return None
    return {"rope_type": "llama3", "original_max_position_embeddings": length} | keys


def rotary_config(model: ModelConfig) -> dict[str, Any]:
    """The `rope_parameters` of `model`, and `rope_theta` for readers before transformers 5."""
    scaling = model.rotary_scaling
    rope = {"rope_type": "default" if scaling == "none" else scaling, "rope_theta": model.rotary_base}
    rope |= {key: value for name, key in ROPE_KEYS[scaling].items() if (value := getattr(model, name)) is not None}
    if scaling != "none":
        rope.setdefault("original_max_position_embeddings", model.seq_len)
    before = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "rope_parameters": rope,
        "rope_theta": model.rotary_base,
        "rope_scaling": None if scaling == "none" else before,
    }
