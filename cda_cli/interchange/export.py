"""A checkpoint → a folder that other tools load, with a model card. The folder appears whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from cda_cli.errors import ConfigError, did_you_mean
from cda_cli.interchange.hf_files import write_hf
from cda_cli.interchange.model_card import model_card
from cda_cli.interchange.published_files import write_published
from cda_cli.restore import Restored, restore
from cda_cli.storage import check_free, published_folder


class Format(NamedTuple):
    """`write` writes the files into an empty folder, and returns how `library` loads them, with {name} for the folder.

    It raises ConfigError or DataError for what the format lacks.
    """

    library: str
    write: Callable[[Restored, Path], str]


FORMATS = {
    "hf": Format("transformers", write_hf),
    "published": Format("coordinate_descent_attention", write_published),
}
CARD = "README.md"


class Exported(NamedTuple):
    """A folder that was written, with the bytes of each of its files."""

    folder: Path
    checkpoint: Path
    files: dict[str, int]


def export(
    checkpoint: Path,
    folder: Path,
    format: str,
    *,
    name: str,
    license: str | None = None,
    best: bool = False,
    ema: bool = False,
) -> Exported:
    """Writes the model of a checkpoint, or of a run, into `folder` (see `restore` for `best` and `ema`).

    `name` is what the model card calls the model, and how a reader loads it. `license` is an identifier, by default
    that of the model that was imported, if it stated one. Raises ConfigError for a folder that is not empty and for a
    model that the format cannot hold, CheckpointError for a checkpoint that cannot be read, and StorageError for a
    write that fails.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}: {did_you_mean(format, FORMATS)}")
    check_free(folder)
    restored = restore(checkpoint, torch.device("cpu"), best=best, ema=ema)
    with published_folder(folder, over_empty=True) as target:
        loading = FORMATS[format].write(restored, target).format(name=name)
        card = model_card(restored, name, license, FORMATS[format].library, loading)
        (target / CARD).write_text(card, encoding="utf-8")
        files = {file.name: file.stat().st_size for file in sorted(target.iterdir())}
    return Exported(folder, restored.path, files)
