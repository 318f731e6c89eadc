"""Opens a model of another tool: a folder of transformers, the same on the Hugging Face hub, a GGUF file, or weights of
the published package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cda_cli.data import bpe_size, hub_folder, load_tokenizer
from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.interchange.conversion import NOTHING, Read, Rows, full_names
from cda_cli.interchange.families import family_of, model_settings, wanted_context
from cda_cli.interchange.gguf_file import LICENCE, open_gguf
from cda_cli.interchange.own_folder import PREFIX, is_own, own_model, own_tensors
from cda_cli.interchange.published_file import PUBLISHED, is_published, open_published
from cda_cli.interchange.source_tokenizer import (
    TOKENIZER_FILE,
    SourceTokenizer,
    tokenizer_of_folder,
    tokenizer_of_gguf,
    tokenizer_of_text,
)
from cda_cli.interchange.weights import INDEX, SINGLE, digest_of, open_safetensors, read_json, weight_files

HUB, PACKAGE = "hf:", "published:"
CONFIG = "config.json"
# What is fetched of a model on the hub: no code, no pickled weights, and no second copy of them under another name.
WANTED = (CONFIG, "model*.safetensors", INDEX, TOKENIZER_FILE, "tokenizer_config.json", "README.md")


class Source(NamedTuple):
    """A model whose tensors are not read yet.

    `settings` are those of `model`. `tensors` says which of the tensors that `readers` reads make each of ours, and
    `derived` matches the names of those that are not needed. `tokenizer` is None for bytes. `origin`, plain JSON, says
    where the model came from.
    """

    settings: dict[str, Any]
    tensors: Mapping[str, Rows]
    derived: str
    readers: dict[str, Read]
    tokenizer: SourceTokenizer | None
    origin: dict[str, Any]


def open_source(name: str, seq_len: int | None = None, tokenizer: str | None = None) -> Source:
    """Opens the model `name`: a folder, a GGUF file, `hf:OWNER/NAME`, or `published:FILE`.

    `seq_len` is a context shorter than its own, and `tokenizer` stands in for its own: a tokenizer.json, a hub id or
    "bytes". Raises CheckpointError for a model that cannot be read, ConfigError for a setting that does not fit, and
    DataError where the hub is out of reach.
    """
    if name.startswith(HUB):
        folder = hub_folder(name.removeprefix(HUB), WANTED)
        return _of_folder(folder, {"source": name, "revision": folder.name}, seq_len, tokenizer)
    if name.startswith(PACKAGE):
        file = Path(name.removeprefix(PACKAGE)).expanduser()
        return _of_package(file, {"source": f"{PACKAGE}{file.absolute()}", "license": None}, seq_len, tokenizer)
    path = Path(name).expanduser()
    if not path.exists():
        raise CheckpointError(f"there is no {path}; give a folder with a {CONFIG}, a GGUF file, or hf:OWNER/NAME")
    if path.is_dir() and not (path / CONFIG).is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise CheckpointError(f"{path} has no {CONFIG}; give a folder that transformers saved, or one GGUF file")
        path = files[0]
    if path.suffix == ".gguf":
        return _of_gguf(path, seq_len, tokenizer)
    if not path.is_dir():
        raise CheckpointError(f"{path} is one file of a model; give the folder with its {CONFIG}, or a GGUF file")
    return _of_folder(path, {"source": str(path.absolute())}, seq_len, tokenizer)


def _of_folder(folder: Path, origin: dict[str, Any], seq_len: int | None, tokenizer: str | None) -> Source:
    config = read_json(folder / CONFIG)
    origin |= {"license": _licence(folder / "README.md")}
    if is_published(config):
        return _of_package(folder / SINGLE, origin, seq_len, tokenizer)
    settings, tensors, prefix, derived = _described(config, seq_len)
    files = weight_files(folder)
    found = open_safetensors(files)
    readers = {full: found[name] for name, full in full_names(found, prefix).items()}
    own = _chosen(tokenizer, config) if tokenizer else tokenizer_of_folder(folder, config)
    origin |= {
        "architecture": config["model_type"],
        "sha256": {file.name: digest_of(file) for file in files},
    }
    return Source(settings, tensors, derived, readers, own, origin)


def _described(config: Mapping[str, Any], seq_len: int | None) -> tuple[dict[str, Any], Mapping[str, Rows], str, str]:
    """The settings of a config.json, its tensors, what begins their names, and what matches those that are derived."""
    if is_own(config):
        model = own_model(config)
        settings = model.model_dump() | {"seq_len": wanted_context(model.seq_len, seq_len)}
        return settings, own_tensors(model), PREFIX, NOTHING
    family = family_of(config)
    return model_settings(config, seq_len), family.tensors, family.prefix, family.derived


def _of_gguf(file: Path, seq_len: int | None, tokenizer: str | None) -> Source:
    opened = open_gguf(file)
    family = family_of(opened.config)
    settings = model_settings(opened.config, seq_len)
    own = _chosen(tokenizer, opened.config) if tokenizer else tokenizer_of_gguf(opened.metadata)
    origin = {
        "source": str(file.absolute()),
        "architecture": opened.config["model_type"],
        "license": opened.metadata.get(LICENCE),
        "sha256": {file.name: digest_of(file)},
    }
    return Source(settings, family.tensors, family.derived, opened.readers, own, origin)


def _of_package(file: Path, origin: dict[str, Any], seq_len: int | None, tokenizer: str | None) -> Source:
    opened = open_published(file, seq_len)
    origin |= {"architecture": "coordinate_descent_attention", "sha256": {file.name: digest_of(file)}}
    own = _chosen(tokenizer or "bytes", {})
    return Source(opened.settings, PUBLISHED, opened.derived, opened.readers, own, origin)


def _chosen(spec: str, config: Mapping[str, Any]) -> SourceTokenizer | None:
    """The tokenizer that a person names in place of the model's own; None for bytes."""
    if bpe_size(spec) is not None:
        raise ConfigError(f"{spec} is trained on a text, and the model knows other tokens; give its tokenizer.json")
    text = load_tokenizer(spec).to_json()
    return None if text is None else tokenizer_of_text(text, spec, config)


def _licence(card: Path) -> str | None:
    """The licence that a model card states in its head."""
    try:
        head = card.read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        return None
    found = re.match(r"---\n(?:.*\n)*?license:[ \t]*([\w.+-]+)", head)
    return found[1] if found else None
