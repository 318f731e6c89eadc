"""Opens a GGUF file: its metadata as a config.json, its tensors under the names and in the layout of transformers.

GGUF names tensors in its own way, which the library `gguf` knows for each architecture. llama.cpp also stores the rows
of the queries and keys of a Llama so that the two channels of a rotated pair are neighbours; here they are put back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.interchange.conversion import Read
from cda_cli.interchange.families import Family, family_of
from cda_cli.interchange.rotary import llama3_scaling
from cda_cli.interchange.weights import damaged

if TYPE_CHECKING:
    import gguf

# Keys of config.json, and those of the metadata, which begin with the architecture.
KEYS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
}
GPT2_KEYS = {
    "n_positions": "context_length",
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_inner": "feed_forward_length",
    "n_head": "attention.head_count",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
SCALING_KEYS = {
    "factor": "rope.scaling.factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "attention_factor": "rope.scaling.yarn_attn_factor",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}
LICENCE = "general.license"
FACTORS = "rope_freqs.weight"  # what the frequency of each rotated pair is divided by


class GgufFile(NamedTuple):
    """A GGUF file as transformers would have it. `metadata` is what the file says besides, by its own keys."""

    config: dict[str, Any]
    readers: dict[str, Read]
    metadata: dict[str, Any]


def open_gguf(file: Path) -> GgufFile:
    """Opens `file` and reads its metadata.

    Raises CheckpointError for a damaged file and for an architecture of no known family, and ConfigError where
    the library is missing.
    """
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ConfigError("a GGUF file takes the library gguf; install it (pip install gguf)") from error
    try:
        reader = gguf.GGUFReader(file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (OSError, ValueError, LookupError, TypeError, OverflowError, MemoryError) as error:
        raise damaged(file, error) from error
    name: Any = metadata.get("general.architecture")
    family = family_of({"model_type": name})
    stored = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(name, metadata, stored)
    return GgufFile(config, _readers(name, family, config, stored), metadata)


def _config(name: str, metadata: Mapping[str, Any], stored: Mapping[str, gguf.ReaderTensor]) -> dict[str, Any]:
    keys = GPT2_KEYS if name == "gpt2" else KEYS
    config = {key: metadata[f"{name}.{its}"] for key, its in keys.items() if f"{name}.{its}" in metadata}
    for key, value in config.items():
        if isinstance(value, list):
            raise CheckpointError(f"the layers of the model differ in their {key}, which cda cannot say; give another")
    rope = {key: metadata[f"{name}.{its}"] for key, its in SCALING_KEYS.items() if f"{name}.{its}" in metadata}
    # A factor without a type is linear for llama.cpp, which also knows an older key of it.
    kind = metadata.get(f"{name}.rope.scaling.type", "linear")
    factor = rope.get("factor", metadata.get(f"{name}.rope.scale_linear", 1.0))
    if kind != "none" and (kind != "linear" or factor not in (0.0, 1.0)):
        config["rope_scaling"] = {"rope_type": kind} | rope
    if FACTORS in stored and (scaling := llama3_scaling(stored[FACTORS].data.tolist(), config.get("rope_theta", 1e4))):
        config["rope_scaling"] = scaling
    rotated = metadata.get(f"{name}.rope.dimension_count")
    if rotated is not None:
        config.setdefault("head_dim", rotated)
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    if "token_embd.weight" in stored:
        config["vocab_size"] = int(stored["token_embd.weight"].shape[-1])
    config["tie_word_embeddings"] = "output.weight" not in stored
    config["attention_bias"] = "blk.0.attn_output.bias" in stored
    config["mlp_bias"] = "blk.0.ffn_up.bias" in stored
    # Without a window in the file, a query sees all keys before it.
    return {"model_type": name, "sliding_window": None} | config


def _readers(
    name: str, family: Family, config: Mapping[str, Any], stored: Mapping[str, gguf.ReaderTensor]
) -> dict[str, Read]:
    """What reads each tensor of the file, under the name of transformers if the family has one."""
    import gguf

    # A damaged file may state more blocks than it can have.
    blocks = min(int(config.get("num_hidden_layers", config.get("n_layer", 0))), len(stored))
    kinds = {word: kind for kind, word in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[name], blocks)
    readers: dict[str, Read] = {}
    # The factors of the scaling of Llama 3 have become settings.
    scaled = config.get("rope_scaling", {}).get("rope_type") == "llama3"
    left = {stored_name: tensor for stored_name, tensor in stored.items() if stored_name != FACTORS or not scaled}
    for hf_name, transposed in _names(family, blocks):
        base, _, part = hf_name.rpartition(".")
        stored_name = f"{names.get_name(base)}.{part}"
        if stored_name in left:
            heads = 0 if name != "llama" else _paired_heads(hf_name, config)
            readers[hf_name] = partial(_read, left.pop(stored_name), heads, transposed)
    return readers | {stored_name: partial(_read, tensor, 0, False) for stored_name, tensor in left.items()}


def _names(family: Family, blocks: int) -> list[tuple[str, bool]]:
    """The names of all tensors that a model of the family may have, and whether each is transposed."""
    each = {
        hf_name: rows.transposed
        for block in range(blocks)
        for rows in family.tensors.values()
        for hf_name in rows.of_block(str(block)).names
    }
    return list(each.items())


def _paired_heads(name: str, config: Mapping[str, Any]) -> int:
    """The number of heads in a tensor whose rotated pairs are neighbours; 0 for another tensor."""
    if re.search(r"\.q_proj\.", name):
        return int(config["num_attention_heads"])
    if re.search(r"\.k_proj\.", name):
        return int(config.get("num_key_value_heads", config["num_attention_heads"]))
    return 0


def _read(tensor: gguf.ReaderTensor, paired_heads: int, transposed: bool) -> Tensor:
    import gguf

    try:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise CheckpointError(
            f"{tensor.name} is stored as {tensor.tensor_type.name}, which the library gguf does not read; give a file "
            "of another type, such as Q8_0"
        ) from error
    # Values that are not quantised lie in the file, which is mapped for reading alone.
    whole = torch.from_numpy(values if values.flags.writeable else values.copy()).float()
    if paired_heads:
        whole = whole.unflatten(0, (paired_heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    return whole.T if transposed else whole
