"""A folder of `cda export` whose model is of our own type, as `source` reads it: its settings, and its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cda_cli.config import ModelConfig, parse
from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.interchange.conversion import Rows
from cda_cli.interchange.hf_files import MODEL_TYPE
from cda_cli.model import expected_tensors

PREFIX = "model."  # of each tensor in the file


def is_own(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a model that transformers knows by this package alone."""
    return config.get("model_type") == MODEL_TYPE


def own_model(config: Mapping[str, Any]) -> ModelConfig:
    """The settings of the model, with the ε of the exported step, which anneals no more.

    Raises CheckpointError where config.json does not have them.
    """
    try:
        model = parse({"model": config["settings"]}).model
        changes = {"attn_eps": config["attention_eps"] or model.attn_eps, "eps_anneal_start": None}
        return parse({"model": model.model_dump() | changes}).model
    except (ConfigError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"the config.json is not one of this version of cda ({error}); export the model again"
        ) from error


def own_tensors(model: ModelConfig) -> dict[str, Rows]:
    """Which tensor of the file is each of ours, as the tables of other families have it."""
    general = (re.sub(r"^blocks\.\d+\.", "blocks.{}.", name) for name in expected_tensors(model))
    return {name: Rows((PREFIX + name,)) for name in general}
