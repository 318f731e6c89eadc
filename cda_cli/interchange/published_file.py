"""The weights of the published package `coordinate_descent_attention`, as safetensors.

The file holds the state dict of its Transformer. The arguments that no shape shows (`attn_use_coor_descent` and so on)
stand as JSON under `arguments` in the metadata of the file; one that is absent has the default of the package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cda_cli.errors import CheckpointError
from cda_cli.interchange.conversion import NOTHING, Read, Rows
from cda_cli.interchange.families import wanted_context
from cda_cli.interchange.weights import damaged, open_safetensors, safetensors_metadata
from cda_cli.model.published import PUBLISHED_NAMES, published_config

ARGUMENTS = "arguments"
DEFAULTS: dict[str, Any] = {
    "attn_use_coor_descent": False,
    "ff_use_coor_descent": False,
    "attn_coor_descent_sparsity_k": 2,
    "ff_coor_descent_sparsity_k": 2,
    "coor_descent_iters": 15,
    "coor_descent_eps": 0.1,
}
PUBLISHED = {
    f"{ours}{part}": Rows((f"{theirs}{part}",))
    for ours, theirs in PUBLISHED_NAMES.items()
    for part in ("", ".weight", ".bias")
}


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a config.json has the arguments of the published Transformer, as `published_files` writes them."""
    return "attn_use_coor_descent" in config


class PublishedFile(NamedTuple):
    """The settings of `model`, what reads each tensor, and the pattern of those that the model does not use."""

    settings: dict[str, Any]
    readers: dict[str, Read]
    derived: str


def open_published(file: Path, seq_len: int | None = None) -> PublishedFile:
    """Opens weights of the published package, with a context of `seq_len` instead of its own.

    Raises CheckpointError for a file that is not such, and ConfigError for a context longer than its own.
    """
    if not file.is_file():
        raise CheckpointError(f"there is no file {file}; give published: a safetensors file")
    readers = open_safetensors([file])
    try:
        arguments = DEFAULTS | json.loads(safetensors_metadata(file).get(ARGUMENTS, "{}"))
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(file, error) from error
    shapes = {name: tuple(read().shape) for name, read in readers.items()}
    sparse = {True: "coordinate-descent", False: None}
    try:
        config = published_config(
            shapes,
            attention=sparse[arguments["attn_use_coor_descent"]] or "softmax",
            attn_k=arguments["attn_coor_descent_sparsity_k"],
            attn_eps=arguments["coor_descent_eps"],
            ff=sparse[arguments["ff_use_coor_descent"]] or "gelu",
            ff_k=arguments["ff_coor_descent_sparsity_k"],
            ff_eps=arguments["coor_descent_eps"],
            n_iters=arguments["coor_descent_iters"],
        )
    except (LookupError, ValueError) as error:
        raise CheckpointError(
            f"{file} does not hold the weights of coordinate_descent_attention.Transformer ({error}); give its state "
            "dict as safetensors"
        ) from error
    settings = config.model_dump() | {"seq_len": wanted_context(config.seq_len, seq_len)}
    # The published softmax does not read the linear of its learned k.
    unread = NOTHING if config.attention != "softmax" else r"layers\.\d+\.0\.to_learned_k\.(weight|bias)"
    return PublishedFile(settings, readers, unread)
