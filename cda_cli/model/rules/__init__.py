"""The attention rules, by their names in the configuration (`model.attention`).

A rule says how the scores of a layer become weights, and what else follows from that: the code that computes them, its
matrix products, its scratch memory, and what is worth telling a person. To add a rule, write its file, add a line to
`RULES` and its name to `ModelSettings.attention`, and test it.
"""

from __future__ import annotations

import torch

from cda_cli.config import ModelConfig
from cda_cli.model.rules.base import AttentionRule, EditRows, Products, Rows
from cda_cli.model.rules.entmax import Entmax
from cda_cli.model.rules.hard_topk import HardTopK
from cda_cli.model.rules.soft_topk import SoftTopK
from cda_cli.model.rules.softmax import Softmax, TemperedSoftmax
from cda_cli.ops import Backend, Choice

RULES: dict[str, type[AttentionRule]] = {
    "softmax": Softmax,
    "coordinate-descent": SoftTopK,
    "tempered-softmax": TemperedSoftmax,
    "hard-topk": HardTopK,
    "entmax": Entmax,
}

__all__ = ["RULES", "AttentionRule", "EditRows", "Products", "Rows", "attention_rule", "model_backend"]


def attention_rule(config: ModelConfig, backend: Backend = "auto") -> AttentionRule:
    """Makes the rule of `config`, as one layer uses it."""
    return RULES[config.attention](config, backend)


def model_backend(config: ModelConfig, backend: Backend, device: torch.device) -> Choice:
    """Chooses the backend of a model's layers on `device`. Raises ValueError if it cannot run."""
    return attention_rule(config, backend).choose_backend(device)
