"""`--data` → documents: the standard library's source, local files, or a Hugging Face dataset.

Local files are read as they are, so that only the text counts; a hub dataset is read through `datasets`, from its cache
or, with `--streaming`, as it comes.
"""

from __future__ import annotations

import glob
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cda_cli.config import DataConfig
from cda_cli.data.documents import DatasetDocuments, Documents, FileDocuments
from cda_cli.data.files import UTF8, compression, head_of
from cda_cli.data.fingerprint import WHOLE_BYTES, content_digest, digest, stats
from cda_cli.data.hub import load_hub_dataset
from cda_cli.errors import DataError

STDLIB = "stdlib"
HUB_PREFIX = "hf:"
# Installed packages are not the library; its tests and its vendored copies are not prose about anything.
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
KINDS = {".txt": "text", ".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
NOT_TEXT_INSIDE = {".parquet", ".tar", ".zip"}
VALIDATION_SPLITS = ("validation", "valid", "test")


class MissingTextError(DataError):
    """There is no file where the text should be."""


@dataclass(frozen=True)
class Source:
    """Documents to train on, with those to validate on where the data comes split.

    `fingerprint` changes whenever the documents may have changed; `identity`, plain JSON, tells them from others, and
    is the same for the same files wherever they are. `single` says that there is one document only. `total_bytes` is
    the size of the text where it is known beforehand.
    """

    description: str
    fingerprint: str
    identity: dict[str, Any]
    training: Documents
    validation: Documents | None = None
    single: bool = False
    total_bytes: int | None = None


def open_source(config: DataConfig) -> Source:
    """The source that `config.source` names. Raises DataError where it is missing, empty or of no known kind."""
    if config.source == STDLIB:
        return _stdlib(config)
    if config.source.startswith(HUB_PREFIX):
        return _hub(config)
    return _files(config)


def absolute_source(source: str) -> str:
    """What names the same text as `source` from any folder."""
    if source == STDLIB or source.startswith(HUB_PREFIX):
        return source
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - which raises for a user that is unknown
    if path.is_absolute():
        return str(path)
    # The folder is no part of a glob.
    folder = os.getcwd() if os.path.exists(path) else glob.escape(os.getcwd())  # noqa: PTH109, PTH110 - raise nothing
    return str(Path(folder, path))


def is_there(source: str) -> bool:
    """Whether local files have that name; of what is not local this is not asked. Raises DataError for a folder."""
    try:
        return source == STDLIB or source.startswith(HUB_PREFIX) or bool(_matches(source))
    except MissingTextError:
        return False
    except OSError:  # such as a name that is too long, which is said where it is opened
        return True


def _stdlib(config: DataConfig) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise DataError("this Python comes without the source of its standard library; give --data a text file")
    version = ".".join(map(str, sys.version_info[:3]))
    return _of_files("text", paths, config, f"the standard library of Python {version}, {len(paths)} files", UTF8)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in STDLIB_SKIPPED]
        yield from (path for name in names if name.endswith(".py") and (path := Path(folder, name)).is_file())


def _files(config: DataConfig) -> Source:
    try:
        paths = [path for path in _matches(config.source) if path.stat().st_size]
        if not paths:
            raise DataError(f"{config.source} is empty; give --data a file that holds text")
        kinds = {_kind(path) for path in paths}
        if len(kinds) > 1:
            raise DataError(
                f"{config.source} matches files of several kinds ({', '.join(sorted(kinds))}); give one kind"
            )
        description = str(paths[0]) if len(paths) == 1 else f"{config.source}, {len(paths)} files"
        return _of_files(kinds.pop(), paths, config, description, config.encoding)
    except OSError as error:
        raise DataError(f"{config.source} cannot be read ({error.strerror}); give --data a file that can") from error


def _of_files(kind: str, paths: list[Path], config: DataConfig, description: str, encoding: str) -> Source:
    sizes = [path.stat().st_size for path in paths]
    total = sum(sizes)
    identity = {"kind": kind, "files": len(paths), "bytes": total, "content": content_digest(paths, sizes)}
    whole = kind == "text"  # a file is a document
    return Source(
        description=description,
        fingerprint=digest(
            identity, encoding, None if whole else config.text_column, stats(paths) if total > WHOLE_BYTES else None
        ),
        identity=identity,
        training=FileDocuments(paths, kind, config.text_column, encoding, description),
        single=whole and len(paths) == 1,
        total_bytes=total if whole and not any(compression(head_of(path)) for path in paths) else None,
    )


def _matches(pattern: str) -> list[Path]:
    """The files that `pattern` names, as they are called there: what a link leads to may have any name."""
    exact = Path(os.path.expanduser(pattern))  # noqa: PTH111 - see absolute_source
    if exact.is_dir():
        raise DataError(f"{pattern} is a folder; give --data a file in it, or a glob such as '{pattern}/*.txt'")
    names = [exact] if exact.exists() else glob.glob(str(exact), recursive=True)  # noqa: PTH207 - absolute patterns
    paths = sorted(Path(name).absolute() for name in names if Path(name).is_file())
    if not paths and glob.has_magic(pattern):
        raise MissingTextError(f"no file matches {pattern}; check the glob given to --data")
    if not paths:
        raise MissingTextError(
            f"there is no file {pattern}; give --data a file, a glob, {HUB_PREFIX}OWNER/NAME, or {STDLIB}"
        )
    return paths


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in PACKED:
        inner = Path(path.stem).suffix.lower()
        if inner not in NOT_TEXT_INSIDE:
            return KINDS.get(inner, "text")
    elif suffix in KINDS:
        return KINDS[suffix]
    raise DataError(f"{path.name} is of no known kind; give --data files that end in {', '.join([*PACKED, *KINDS])}")


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
        return DatasetDocuments(lambda: splits[split], config.text_column, f"{config.source} ({split})")

    identity = {"dataset": config.source, "split": config.split, "held out": held_out}
    return Source(
        description=f"{config.source} ({config.split})",
        fingerprint=digest(identity, config.text_column, _cached_files(splits)),
        identity=identity,
        training=side(config.split),
        validation=side(held_out) if held_out else None,
    )


def _cached_files(splits: Any) -> list[str]:
    """Where `datasets` keeps the splits: its paths hold the revision. Nothing where they stream."""
    return [file["filename"] for split in splits.values() for file in getattr(split, "cache_files", [])]
