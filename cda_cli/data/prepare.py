"""documents → tokens on disk, memory-mapped, cached under a key made of the source and the tokenizer.

The folder of a key holds, for each side, the ids (`train.bin`) and the bytes of text that each stands for
(`train-sizes.bin`), one after another, in the machine's byte order. `meta.json` describes them.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from cda_cli.config import DataConfig
from cda_cli.data.bpe import bpe_size, trained_bpe
from cda_cli.data.cache import Preparation
from cda_cli.data.documents import Documents
from cda_cli.data.fingerprint import digest
from cda_cli.data.sources import Source, open_source
from cda_cli.data.split import Pass, Rule, WholeRule, in_sides
from cda_cli.data.tokenizers import Encoded, Tokenizer, load_tokenizer, split_pieces, utf8
from cda_cli.errors import DataError
from cda_cli.settings import Side

FORMAT = 3
BATCH_CHARACTERS = 1 << 21


@dataclass(frozen=True)
class Tokens:
    """`ids` [N] of an unsigned type, and `sizes` [N], the bytes of text that each stands for; both memory-mapped.

    A separator and an unknown token stand for no byte. `text_bytes` counts the text that the tokens were made from, as
    UTF-8. `lost_bytes` counts those of its bytes that no token stands for. `digest` is that of the ids, if they were
    prepared. `is_target` [N] says which tokens are to be predicted; None: all of them.
    """

    ids: NDArray[Any]
    sizes: NDArray[Any]
    text_bytes: int
    lost_bytes: int = 0
    digest: str = ""
    is_target: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def targets(self, first: int, end: int) -> NDArray[Any]:
        """The ids of the tokens from `first` to before `end` that are to be predicted."""
        return self.ids[first:end] if self.is_target is None else self.ids[first:end][self.is_target[first:end]]


def loss_of_text(sides: Iterable[Tokens]) -> str | None:
    """A sentence if no token stands for some of the text of `sides`, else None."""
    lost, whole = (sum(counts) for counts in zip(*((side.lost_bytes, side.text_bytes) for side in sides), strict=True))
    if not lost:
        return None
    return (
        f"the tokenizer loses {lost / whole:.2%} of the text: no token, or only an unknown one, stands for {lost:,} of "
        f"{whole:,} bytes; they are left out of bits per byte"
    )


@dataclass(frozen=True)
class Corpus:
    """Both sides of the data. No document is on both."""

    tokenizer: Tokenizer
    train: Tokens
    validation: Tokens
    description: str
    from_cache: bool


def prepare(
    config: DataConfig,
    *,
    show_progress: bool,
    should_stop: Callable[[], bool] = lambda: False,
    tokenizer: Tokenizer | None = None,
    spare_cache: Path | None = None,
    once: Callable[[str, Callable[[], str]], str] | None = None,
) -> Corpus:
    """The tokens of both sides, from the cache or else made now, a few megabytes of text at a time.

    `tokenizer` stands in for the one that `config` names. `spare_cache` takes what is not in the cache yet, for a
    caller that must leave nothing behind. `once` is for several processes (see `Preparation`).

    Only a single document is ever held in memory. Raises DataError for bad data, StorageError if the cache cannot be
    written, and PreparationStoppedError once `should_stop()`. None of them leaves anything half-written.
    """
    preparation = Preparation(show_progress, should_stop, spare_cache, once)
    size = None if tokenizer else bpe_size(config.tokenizer)
    if size is None:
        tokenizer = tokenizer or load_tokenizer(config.tokenizer, config.bos, config.eos)
        source = open_source(config, preparation)
    else:
        source = open_source(config, preparation)
        tokenizer = trained_bpe(size, source, config.validation_fraction, preparation, config.bos, config.eos)
    sides, from_cache = _prepared(source, config, tokenizer, ("train", "validation"), preparation)
    return Corpus(tokenizer, sides["train"], sides["validation"], source.description, from_cache)


def prepare_whole(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    show_progress: bool,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Tokens, str]:
    """The tokens of all documents, nothing held out, and the description of the data; otherwise as `prepare`."""
    preparation = Preparation(show_progress, should_stop)
    source = open_source(config, preparation)
    sides, _ = _prepared(source, config, tokenizer, ("all",), preparation)
    return sides["all"], source.description


def _prepared(
    source: Source, config: DataConfig, tokenizer: Tokenizer, names: tuple[Side, ...], preparation: Preparation
) -> tuple[dict[Side, Tokens], bool]:
    """The sides called `names`, and whether they were in the cache."""
    fraction = config.validation_fraction
    key = digest(FORMAT, sys.byteorder, source.fingerprint, tokenizer.fingerprint, fraction, names)
    return preparation.cached(
        "tokens",
        key,
        "prepared tokens",
        load=lambda folder: _load(folder, tokenizer, names),
        make=lambda folder: _write(folder, source, tokenizer, fraction, names, preparation),
    )


@dataclass
class _Writer:
    """Writes the files of one side."""

    ids: IO[bytes]
    sizes: IO[bytes]
    found: blake2b = field(default_factory=lambda: blake2b(digest_size=16))  # of the ids
    tokens: int = 0
    text_bytes: int = 0
    lost_bytes: int = 0

    def add(self, encoded: Encoded, text_bytes: int) -> None:
        self.ids.write(encoded.ids.data)
        self.sizes.write(encoded.sizes.data)
        self.found.update(encoded.ids.data)
        self.tokens += len(encoded.ids)
        self.text_bytes += text_bytes
        self.lost_bytes += text_bytes - int(encoded.sizes.sum(dtype=np.int64))

    def counts(self) -> dict[str, Any]:
        counts = {"tokens": self.tokens, "text_bytes": self.text_bytes, "lost_bytes": self.lost_bytes}
        return {**counts, "digest": self.found.hexdigest()}


@dataclass
class _Batch:
    """Pieces of documents on their way through the tokenizer."""

    pieces: list[str] = field(default_factory=list)
    places: list[tuple[Side, bool, bool]] = field(default_factory=list)  # the side; whether a document begins, or ends
    characters: int = 0

    def add(self, piece: str, side: Side, begins: bool, ends: bool) -> None:
        self.pieces.append(piece)
        self.places.append((side, begins, ends))
        self.characters += len(piece)


def _write(
    folder: Path,
    source: Source,
    tokenizer: Tokenizer,
    fraction: float,
    names: tuple[Side, ...],
    preparation: Preparation,
) -> None:
    """Writes the sides and meta.json into `folder`."""

    def written(passes: list[Pass]) -> dict[Side, dict[str, Any]]:
        return _write_passes(folder, passes, source, tokenizer, names, preparation)

    if names == ("all",):
        rule: Rule = WholeRule("all")
        counts = written([(documents, rule) for documents in (source.training, source.validation) if documents])
    else:
        counts = in_sides(source, fraction, written)
    _check_sides(source, counts)
    meta = {
        "format": FORMAT,
        "description": source.description,
        "tokenizer": tokenizer.fingerprint,
        "sides": counts,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")


def _write_passes(
    folder: Path,
    passes: list[Pass],
    source: Source,
    tokenizer: Tokenizer,
    names: tuple[Side, ...],
    preparation: Preparation,
) -> dict[Side, dict[str, Any]]:
    """Writes the files of each side, and returns what is in them."""
    with contextlib.ExitStack() as files, preparation.bar("tokens", source.total_bytes) as bar:
        writers: dict[Side, _Writer] = {}
        for name in names:
            ids, sizes = (files.enter_context(path.open("wb")) for path in _paths(folder, name))
            writers[name] = _Writer(ids, sizes)
        for documents, rule in passes:
            for batch in _batches(documents, rule):
                bar.update(_encode(batch, tokenizer, writers))
                preparation.check()
    return {side: writer.counts() for side, writer in writers.items()}


def _paths(folder: Path, side: Side) -> tuple[Path, Path]:
    """The files of the ids and of their sizes."""
    return folder / f"{side}.bin", folder / f"{side}-sizes.bin"


def _batches(documents: Documents, rule: Rule) -> Iterator[_Batch]:
    batch = _Batch()
    for text in documents:
        for side, part, ends in rule.place(text):
            pieces = list(split_pieces(part)) or [""]
            for index, piece in enumerate(pieces):
                batch.add(piece, side, index == 0, ends and index == len(pieces) - 1)
                if batch.characters >= BATCH_CHARACTERS:
                    yield batch
                    batch = _Batch()
    yield batch


def _encode(batch: _Batch, tokenizer: Tokenizer, writers: dict[Side, _Writer]) -> int:
    """Writes the batch, and returns the bytes of its text."""
    total = 0
    encoded = zip(tokenizer.encode_batch(batch.pieces), batch.pieces, batch.places, strict=True)
    for tokens, piece, (side, begins, ends) in encoded:
        size = len(piece) if piece.isascii() else len(utf8(piece))
        if begins:
            writers[side].add(tokenizer.beginning, 0)
        writers[side].add(tokens, size)
        if ends:
            writers[side].add(tokenizer.ending, 0)
        total += size
    return total


def _check_sides(source: Source, counts: dict[Side, dict[str, Any]]) -> None:
    if not any(count["tokens"] for count in counts.values()):
        raise DataError(f"{source.description} holds no text; give --data something to train on")
    for side, count in counts.items():
        if not count["tokens"]:
            raise DataError(f"{source.description} holds too little text to have a {side} side; give --data more text")


def _load(folder: Path, tokenizer: Tokenizer, names: tuple[Side, ...]) -> dict[Side, Tokens] | None:
    """The sides as they are in the cache; None if they are absent or damaged."""
    sides: dict[Side, Tokens] = {}
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or meta["tokenizer"] != tokenizer.fingerprint:
            return None
        for name in names:
            counts, (ids, sizes) = meta["sides"][name], _paths(folder, name)
            for path, dtype in ((ids, tokenizer.dtype), (sizes, tokenizer.size_dtype)):
                if path.stat().st_size != counts["tokens"] * dtype.itemsize:
                    return None
            sides[name] = Tokens(
                np.memmap(ids, dtype=tokenizer.dtype, mode="r"),
                np.memmap(sizes, dtype=tokenizer.size_dtype, mode="r"),
                int(counts["text_bytes"]),
                int(counts["lost_bytes"]),
                str(counts["digest"]),
            )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sides
