"""Opens safetensors files of other tools: each tensor is mapped into memory, and read when it is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cda_cli.errors import CheckpointError, brief
from cda_cli.interchange.conversion import Read
from cda_cli.storage import sha256_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder: those that its index names, or the only one.

    Raises CheckpointError where there is none, or where one that the index names is missing.
    """
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return [folder / SINGLE]
        pickled = [path.name for pattern in PICKLED for path in folder.glob(pattern)]
        also = f"; it has {pickled[0]}, which may run code when it is read, so cda does not" if pickled else ""
        raise CheckpointError(f"{folder} has no {SINGLE}{also}: save the model as safetensors, or give a GGUF file")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map; download it again")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}, which {INDEX} names; download it again")
    return [folder / name for name in names]


def open_safetensors(files: Sequence[Path]) -> dict[str, Read]:
    """What reads each tensor of `files`, by its name. Raises CheckpointError for a file that is damaged."""
    from safetensors import SafetensorError, safe_open

    readers: dict[str, Read] = {}
    for file in files:
        try:
            handle = safe_open(file, framework="pt")
            readers |= {name: partial(handle.get_tensor, name) for name in _names(handle)}
        except (SafetensorError, OSError) as error:
            raise damaged(file, error) from error
    return readers


def _names(handle: Any) -> list[str]:
    return list(handle.keys())


def safetensors_metadata(file: Path) -> Mapping[str, str]:
    """The words that a safetensors file has besides its tensors. Raises CheckpointError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> CheckpointError:
    """The error for a file of weights that cannot be read."""
    return CheckpointError(f"{file} is damaged, or cut short ({brief(error)}); download it again")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where the file holds none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent} has no {file.name}; give the folder of a model that has one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, error) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is not a JSON object; download it again")
    return content


def digest_of(file: Path) -> str:
    """The SHA-256 of a file. Raises CheckpointError where it cannot be read."""
    try:
        return sha256_of(file)
    except OSError as error:
        raise damaged(file, error) from error
