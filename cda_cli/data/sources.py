"""`--data` → documents: the standard library's source, local files, or a Hugging Face dataset.

All are read through `datasets`, in a fixed order, streaming for local files, so that no second copy of them is
written; a hub dataset is downloaded into the cache of `datasets`, or streams with `--streaming`.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cda_cli.config import DataConfig
from cda_cli.data.hub import brief, load_hub_dataset, local_only, quiet_libraries, read_errors
from cda_cli.errors import DataError

STDLIB = "stdlib"
HUB_PREFIX = "hf:"
# Installed packages are not the library; its tests and its vendored copies are not prose about anything.
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
NOT_TEXT_INSIDE_GZ = {".parquet", ".tar", ".zip"}
VALIDATION_SPLITS = ("validation", "valid", "test")

Position = dict[str, Any]


class Documents:
    """The texts of a source, one str a document, empty ones left out, in a fixed order.

    `open_rows` gives the rows: a `datasets` data set, mapped or iterable, whose `column` holds the text.
    """

    def __init__(self, open_rows: Callable[[], Any], column: str, where: str) -> None:
        self._open_rows = open_rows
        self._column = column
        self._where = where

    def __iter__(self) -> Iterator[str]:
        """Every document. Raises DataError."""
        for row in self._rows(self._open()):
            if text := self._text(row):
                yield text

    def read(self, position: Position | None = None) -> Iterator[tuple[str, Position]]:
        """Each document after `position` (None: from the start) with the position after it, a plain JSON value.

        Only for iterable data sets: streaming, or local files. Raises DataError.
        """
        rows = self._open()
        if position is not None:
            try:
                rows.load_state_dict(position)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise DataError(f"the saved position in {self._where} is not one of it; use an earlier one") from error
        for row in self._rows(rows):
            if text := self._text(row):
                yield text, rows.state_dict()

    def _open(self) -> Any:
        rows = self._open_rows()
        names = rows.column_names
        if names is not None:
            self._check_column(names)
            return rows.select_columns(self._column)
        # A position that is loaded stays in the object, and a later pass would start there; this makes a new one.
        return rows.with_format(None)

    def _rows(self, rows: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from rows
        except read_errors() as error:
            raise DataError(f"{self._where} cannot be read ({brief(error)}); mend the file, or leave it out") from error

    def _text(self, row: dict[str, Any]) -> str:
        self._check_column(row)
        text = row[self._column]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"the column {self._column!r} of {self._where} holds {type(text).__name__}, not text; "
                "choose another --text-column"
            )
        return text or ""

    def _check_column(self, names: Any) -> None:
        if self._column not in names:
            raise DataError(
                f"{self._where} has no column {self._column!r}; choose --text-column from {', '.join(map(str, names))}"
            )


@dataclass(frozen=True)
class Source:
    """Documents to train on, with those to validate on where the data comes split.

    `fingerprint` changes whenever the documents may have changed. `single` says that there is one document only.
    `total_bytes` is the size of the text where it is known beforehand.
    """

    description: str
    fingerprint: str
    training: Documents
    validation: Documents | None = None
    single: bool = False
    total_bytes: int | None = None


def open_source(config: DataConfig) -> Source:
    """The source that `config.source` names. Raises DataError where it is missing, empty or of no known kind."""
    if config.source == STDLIB:
        return _stdlib()
    if config.source.startswith(HUB_PREFIX):
        return _hub(config)
    return _files(config)


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise DataError("this Python comes without the source of its standard library; give --data a text file")
    sizes = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]
    version = ".".join(map(str, sys.version_info[:3]))
    description = f"the standard library of Python {version}, {len(paths)} files"
    return Source(
        description=description,
        fingerprint=digest(STDLIB, sys.version, sizes),
        training=_text_documents(paths, description),
        total_bytes=sum(size for _, size in sizes),
    )


def _python_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in STDLIB_SKIPPED]
        yield from (path for name in names if name.endswith(".py") and (path := Path(folder, name)).is_file())


def _files(config: DataConfig) -> Source:
    try:
        paths = [path for path in _matches(config.source) if _size(path)]
    except OSError as error:
        raise DataError(f"{config.source} cannot be read ({error.strerror}); give --data a file that can") from error
    if not paths:
        raise DataError(f"{config.source} is empty; give --data a file that holds text")
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        raise DataError(f"{config.source} matches files of several kinds ({', '.join(sorted(kinds))}); give one kind")
    kind = kinds.pop()
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    description = str(paths[0]) if len(paths) == 1 else f"{config.source}, {len(paths)} files"
    if kind == "text":
        packed = any(path.suffix == ".gz" for path in paths)
        return Source(
            description=description,
            fingerprint=digest(kind, stats),
            training=_text_documents(paths, description),
            single=len(paths) == 1,
            total_bytes=None if packed else sum(size for _, size, _ in stats),
        )
    return Source(
        description=description,
        fingerprint=digest(kind, stats, config.text_column),
        training=Documents(lambda: _open_table(kind, paths, config.text_column), config.text_column, description),
    )


def _matches(pattern: str) -> list[Path]:
    exact = Path(pattern).expanduser()
    if exact.is_dir():
        raise DataError(f"{pattern} is a folder; give --data a file in it, or a glob such as '{pattern}/*.txt'")
    names = [exact] if exact.exists() else glob.glob(str(exact), recursive=True)  # noqa: PTH207 - absolute patterns
    paths = sorted(Path(name).resolve() for name in names if Path(name).is_file())
    if not paths and glob.has_magic(pattern):
        raise DataError(f"no file matches {pattern}; check the glob given to --data")
    if not paths:
        raise DataError(f"there is no file {pattern}; give --data a file, a glob, {HUB_PREFIX}OWNER/NAME, or {STDLIB}")
    return paths


def _size(path: Path) -> int:
    with path.open("rb"):  # that it can be read is better known now than halfway
        return path.stat().st_size


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        inner = Path(path.stem).suffix.lower()
        if inner not in NOT_TEXT_INSIDE_GZ:
            return KINDS.get(inner, "text")
    elif suffix in KINDS:
        return KINDS[suffix]
    raise DataError(f"{path.name} is of no known kind; give --data files that end in .gz, {', '.join(KINDS)}")


def _text_documents(paths: list[Path], where: str) -> Documents:
    # The "text" builder of `datasets` opens files with universal newlines, which would change their line endings.
    def open_rows() -> Any:
        import datasets

        with quiet_libraries(), local_only():
            return datasets.IterableDataset.from_generator(_read_texts, gen_kwargs={"paths": list(map(str, paths))})

    return Documents(open_rows, "text", where)


def _read_texts(paths: list[str]) -> Iterator[dict[str, str]]:
    """Rows whose "text" is that of a whole file, every line ending as it is; bytes that are not UTF-8 become U+FFFD."""
    for path in paths:
        with gzip.open(path, "rb") if path.endswith(".gz") else Path(path).open("rb") as file:
            yield {"text": file.read().decode("utf-8", errors="replace")}


def _open_table(kind: str, paths: list[Path], column: str) -> Any:
    import datasets

    options: dict[str, Any] = {}
    if kind == "csv":  # every cell of the column as it is written: "NA" and "007" are text
        options = {"keep_default_na": False, "converters": {column: str}}
    try:
        with quiet_libraries(), local_only():
            names = [glob.escape(str(path)) for path in paths]
            return datasets.load_dataset(kind, data_files=names, split="train", streaming=True, **options)
    except StopIteration as error:  # what a builder raises where the first file has no row
        raise DataError(f"{paths[0]} holds no rows; leave it out of --data") from error
    except read_errors() as error:
        raise DataError(f"{paths[0]} cannot be read as {kind} ({brief(error)}); mend it, or leave it out") from error


def _hub(config: DataConfig) -> Source:
    matched = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::(.+))?", config.source.removeprefix(HUB_PREFIX))
    if not matched:
        raise DataError(f"{config.source} names no dataset; write --data {HUB_PREFIX}OWNER/NAME or OWNER/NAME:CONFIG")
    name, configuration = matched.groups()
    splits = load_hub_dataset(name, configuration, streaming=config.streaming)
    if config.split not in splits:
        raise DataError(f"{name} has no split {config.split!r}; choose --data-split from {', '.join(splits)}")
    held_out = next((key for key in VALIDATION_SPLITS if key in splits and key != config.split), None)

    def side(split: str) -> Documents:
        return Documents(lambda: splits[split], config.text_column, f"{config.source} ({split})")

    return Source(
        description=f"{config.source} ({config.split})",
        fingerprint=digest(config.source, config.split, held_out, config.text_column, _cached_files(splits)),
        training=side(config.split),
        validation=side(held_out) if held_out else None,
    )


def _cached_files(splits: Any) -> list[str]:
    """Where `datasets` keeps the splits: its paths hold the revision. Nothing where they stream."""
    return [file["filename"] for split in splits.values() for file in getattr(split, "cache_files", [])]


def digest(*parts: Any) -> str:
    """A short fingerprint of plain values."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
