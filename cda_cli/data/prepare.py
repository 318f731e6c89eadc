"""documents → tokens on disk, memory-mapped, cached under a key made of the source and the tokenizer.

The folder of a key holds `train.bin`, `validation.bin` (the ids, one after another, in the machine's byte order) and
`meta.json`. It is written whole under another name and then renamed, so that what is there is complete.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cda_cli.config import DataConfig
from cda_cli.data.documents import Documents
from cda_cli.data.fingerprint import digest
from cda_cli.data.sources import Source, open_source
from cda_cli.data.split import CutRule, HashRule, Rule, Side, WholeRule
from cda_cli.data.tokenizers import Tokenizer, load_tokenizer, split_pieces, utf8
from cda_cli.errors import CdaError, DataError, StorageError
from cda_cli.storage import published_folder, remove_published, remove_stale

FORMAT = 2
SIDES: tuple[Side, Side] = ("train", "validation")
BATCH_CHARACTERS = 1 << 21


class PreparationStoppedError(CdaError):
    """`should_stop` said so. Nothing was left behind."""

    exit_code = 130


@dataclass(frozen=True)
class Tokens:
    """`ids` [N] of an unsigned type, memory-mapped, and the bytes of the text that they stand for.

    A separator counts as one byte, so that with byte tokens `bytes_per_token` is exactly 1. `digest` is that of the
    ids, where they were prepared.
    """

    ids: NDArray[Any]
    text_bytes: int
    digest: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / len(self.ids)


@dataclass(frozen=True)
class Corpus:
    """Both sides of the data; no document is on both."""

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    description: str
    from_cache: bool


def cache_folder() -> Path:
    """$CDA_CACHE, else $XDG_CACHE_HOME/cda, else ~/.cache/cda."""
    if folder := os.environ.get("CDA_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "cda"


def prepare(
    config: DataConfig,
    *,
    show_progress: bool,
    should_stop: Callable[[], bool] = lambda: False,
    tokenizer: Tokenizer | None = None,
    spare_cache: Path | None = None,
) -> Corpus:
    """The tokens of both sides, from the cache or else made now, a few megabytes of text at a time.

    `tokenizer` stands in for the one that `config` names; `spare_cache` is where tokens are put that are not in the
    cache yet, for a caller that must leave nothing behind.

    Only a single document is ever held in memory. Raises DataError for bad data, StorageError where the cache cannot
    be written, PreparationStoppedError once `should_stop()`; none of them leaves anything half-written.
    """
    tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    source = open_source(config)
    key = digest(FORMAT, sys.byteorder, source.fingerprint, tokenizer.fingerprint, config.validation_fraction)
    folder = cache_folder() / "tokens" / key
    cached = _load(folder, tokenizer)
    if cached is None and spare_cache is not None:
        folder = spare_cache / key
    if cached is None:
        _make(folder, source, tokenizer, config.validation_fraction, _Meter(show_progress, should_stop))
    corpus = cached or _load(folder, tokenizer)
    if corpus is None:
        raise StorageError(f"the prepared tokens in {folder} vanished; run again, or set CDA_CACHE to another folder")
    return Corpus(tokenizer, *corpus, source.description, from_cache=cached is not None)


def _make(folder: Path, source: Source, tokenizer: Tokenizer, fraction: float, meter: _Meter) -> None:
    """Writes `folder` whole, in place of a damaged one. Where another process was first, its folder stays."""
    remove_stale(folder.parent)
    try:
        if os.path.lexists(folder):
            remove_published(folder)
        with published_folder(folder) as staging:
            _write(staging, source, tokenizer, fraction, meter)
    except StorageError as error:
        if _load(folder, tokenizer) is None:
            raise StorageError(f"no prepared tokens: {error}; CDA_CACHE can name another folder for them") from error


@dataclass
class _Writer:
    """One side's file."""

    file: IO[bytes]
    found: blake2b = field(default_factory=lambda: blake2b(digest_size=16))
    tokens: int = 0
    text_bytes: int = 0

    def add(self, ids: NDArray[Any], text_bytes: int) -> None:
        self.file.write(ids.data)
        self.found.update(ids.data)
        self.tokens += len(ids)
        self.text_bytes += text_bytes


@dataclass(frozen=True)
class _Meter:
    show: bool
    should_stop: Callable[[], bool]

    def bar(self, total: int | None) -> tqdm[Any]:
        return tqdm(total=total, desc="tokens", unit="B", unit_scale=True, disable=not self.show, leave=False)


@dataclass
class _Batch:
    """Pieces of documents on their way through the tokenizer."""

    pieces: list[str] = field(default_factory=list)
    places: list[tuple[Side, bool]] = field(default_factory=list)  # the side, and whether a document ends here
    characters: int = 0

    def add(self, piece: str, side: Side, ends: bool) -> None:
        self.pieces.append(piece)
        self.places.append((side, ends))
        self.characters += len(piece)


def _write(folder: Path, source: Source, tokenizer: Tokenizer, fraction: float, meter: _Meter) -> None:
    """Both sides and meta.json into `folder`."""
    if source.validation is not None:
        passes: list[tuple[Documents, Rule]] = [
            (source.training, WholeRule("train")),
            (source.validation, WholeRule("validation")),
        ]
        counts = _write_passes(folder, passes, source, tokenizer, meter)
    else:
        rule: Rule = CutRule(fraction) if source.single else HashRule.of_fraction(fraction)
        counts = _write_passes(folder, [(source.training, rule)], source, tokenizer, meter)
        other = rule.after_one_sided(fraction) if isinstance(rule, HashRule) else None
        if other is not None:
            counts = _write_passes(folder, [(source.training, other)], source, tokenizer, meter)
    _check_sides(source, counts)
    meta = {
        "format": FORMAT,
        "description": source.description,
        "tokenizer": tokenizer.fingerprint,
        "dtype": tokenizer.dtype.name,
        "sides": counts,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _write_passes(
    folder: Path, passes: list[tuple[Documents, Rule]], source: Source, tokenizer: Tokenizer, meter: _Meter
) -> dict[Side, dict[str, Any]]:
    """One file a side; the tokens and text bytes of each, and the digest of its ids."""
    with (
        (folder / "train.bin").open("wb") as train,
        (folder / "validation.bin").open("wb") as validation,
        meter.bar(source.total_bytes) as bar,
    ):
        writers: dict[Side, _Writer] = {"train": _Writer(train), "validation": _Writer(validation)}
        for documents, rule in passes:
            for batch in _batches(documents, rule):
                bar.update(_encode(batch, tokenizer, writers))
                if meter.should_stop():
                    raise PreparationStoppedError("stopped while preparing the data; run again to start it anew")
    return {
        side: {"tokens": w.tokens, "text_bytes": w.text_bytes, "digest": w.found.hexdigest()}
        for side, w in writers.items()
    }


def _batches(documents: Documents, rule: Rule) -> Iterator[_Batch]:
    batch = _Batch()
    for text in documents:
        for side, part, ends in rule.place(text):
            pieces = list(split_pieces(part)) or [""]
            for index, piece in enumerate(pieces):
                batch.add(piece, side, ends and index == len(pieces) - 1)
                if batch.characters >= BATCH_CHARACTERS:
                    yield batch
                    batch = _Batch()
    yield batch


def _encode(batch: _Batch, tokenizer: Tokenizer, writers: dict[Side, _Writer]) -> int:
    """Writes the batch; the bytes of its text."""
    separator = np.array([tokenizer.separator], dtype=tokenizer.dtype)
    total = 0
    for ids, piece, (side, ends) in zip(tokenizer.encode_batch(batch.pieces), batch.pieces, batch.places, strict=True):
        size = len(piece) if piece.isascii() else len(utf8(piece))
        writers[side].add(ids, size)
        if ends:
            writers[side].add(separator, 1)
        total += size
    return total


def _check_sides(source: Source, counts: dict[Side, dict[str, Any]]) -> None:
    if not any(count["tokens"] for count in counts.values()):
        raise DataError(f"{source.description} holds no text; give --data something to train on")
    for side, count in counts.items():
        if not count["tokens"]:
            raise DataError(f"{source.description} holds too little text to have a {side} side; give --data more text")


def _load(folder: Path, tokenizer: Tokenizer) -> tuple[Tokens, Tokens] | None:
    """Both sides as they are in the cache; None where they are absent or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or meta["tokenizer"] != tokenizer.fingerprint:
            return None
        dtype = np.dtype(meta["dtype"])
        sides = []
        for side in SIDES:
            path, count = folder / f"{side}.bin", meta["sides"][side]
            if path.stat().st_size != count["tokens"] * dtype.itemsize:
                return None
            sides.append(Tokens(np.memmap(path, dtype=dtype, mode="r"), int(count["text_bytes"]), str(count["digest"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sides[0], sides[1]
