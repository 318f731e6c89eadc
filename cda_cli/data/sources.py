"""`--data` → documents: the standard library's source, local files, a download, or a Hugging Face dataset.

Local files are read as they are, so that only the text counts. A hub dataset is read through `datasets`, from its cache
or, with `--streaming`, as it comes.
"""

from __future__ import annotations

import glob
import os
import re
import sys
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cda_cli.config import DataConfig
from cda_cli.data.cache import Preparation
from cda_cli.data.documents import DataFile, DatasetDocuments, Documents, FileDocuments
from cda_cli.data.download import downloaded, is_address
from cda_cli.data.files import UTF8, check_is_text, compression, head_of
from cda_cli.data.fingerprint import WHOLE_BYTES, content_digest, digest, stats
from cda_cli.data.folders import FolderFiles, saved_splits
from cda_cli.data.hub import load_hub_dataset
from cda_cli.data.row_readers import kind_by_name
from cda_cli.data.tasks import is_task
from cda_cli.errors import DataError
from cda_cli.plurals import counted

STDLIB = "stdlib"
HUB_PREFIX = "hf:"
# Installed packages are not the library; its tests and its vendored copies are not prose about anything.
STDLIB_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
QUIETLY = Preparation()
VALIDATION_SPLITS = ("validation", "valid", "test")


class MissingTextError(DataError):
    """No file is in the place of the text."""


@dataclass(frozen=True)
class Source:
    """Documents to train on, and those to validate on if the data comes split.

    `fingerprint` changes whenever the documents may have changed. `identity`, plain JSON, tells them from others, and
    is the same for the same files wherever they are. `single` says that there is one document only. `total_bytes` is
    the size of the text if it is known beforehand.
    """

    description: str
    fingerprint: str
    identity: dict[str, Any]
    training: Documents
    validation: Documents | None = None
    single: bool = False
    total_bytes: int | None = None

    def without_documents(self) -> Source:
        """The same source for another process, which is told about it and does not read it."""
        nothing = FileDocuments([], "", UTF8, self.description)
        return replace(self, training=nothing, validation=nothing if self.validation else None)


def open_source(config: DataConfig, preparation: Preparation = QUIETLY) -> Source:
    """The source that `config.source` names, downloaded if it is an address.

    Raises DataError if it is missing, empty or binary, and StorageError if a download cannot be stored.
    """
    if config.source == STDLIB:
        return _stdlib(config, preparation)
    if config.source.startswith(HUB_PREFIX):
        return _hub(config)
    return _local(config, preparation)


def absolute_source(source: str) -> str:
    """A name of the same text as `source` that holds from any folder."""
    if not _is_path(source):
        return source
    path = Path(os.path.expanduser(source))  # noqa: PTH111 - which raises for a user that is unknown
    if path.is_absolute():
        return str(path)
    # The folder is no part of a glob.
    folder = os.getcwd() if os.path.exists(path) else glob.escape(os.getcwd())  # noqa: PTH109, PTH110 - raise nothing
    return str(Path(folder, path))


def is_there(source: str) -> bool:
    """Whether a local text has that name. A text that is not local counts as there, as only opening it can tell."""
    try:
        folder = os.path.isdir(os.path.expanduser(source))  # noqa: PTH111, PTH112 - see absolute_source
        return not _is_path(source) or folder or bool(_matches(source))
    except MissingTextError:
        return False
    except OSError:  # such as a name that is too long; opening it says so
        return True


def _is_path(source: str) -> bool:
    return source != STDLIB and not source.startswith(HUB_PREFIX) and not is_address(source) and not is_task(source)


def _stdlib(config: DataConfig, preparation: Preparation) -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(_python_files(root), key=lambda path: path.relative_to(root).as_posix())
    if not paths:
        raise DataError("this Python comes without the source of its standard library; give --data a text file")
    version = ".".join(map(str, sys.version_info[:3]))
    files = [DataFile(path, "text") for path in paths]
    description = f"the standard library of Python {version}, {counted(len(paths), 'file')}"
    return _of_files(files, config, description, UTF8, preparation)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in STDLIB_SKIPPED]
        yield from (path for name in names if name.endswith(".py") and (path := Path(folder, name)).is_file())


def _local(config: DataConfig, preparation: Preparation) -> Source:
    """A file, a glob, a folder, or what an address leads to."""
    source, encoding = config.source, config.encoding
    try:
        if is_address(source):
            path = downloaded(source, preparation)
            files = [DataFile(path, _kind(path, encoding))]
            return _of_files(files, config, source.partition("#")[0], encoding, preparation)
        folder = Path(os.path.expanduser(source))  # noqa: PTH111 - see absolute_source
        if folder.is_dir():
            return _folder(folder, config, preparation)
        paths = [path for path in _matches(source) if path.stat().st_size]
        files = [DataFile(path, _kind(path, encoding)) for path in paths]
        if not files:
            raise DataError(f"{source} is empty; give --data a file that holds text")
        description = str(paths[0]) if len(paths) == 1 else f"{source}, {counted(len(paths), 'file')}"
        return _of_files(files, config, description, encoding, preparation)
    except OSError as error:
        name = error.filename or source
        raise DataError(f"{name} cannot be read ({error.strerror}); give --data a file that can") from error


def _folder(folder: Path, config: DataConfig, preparation: Preparation) -> Source:
    splits = saved_splits(folder)
    if splits is not None:
        return _saved_dataset(splits, config, preparation)
    found = FolderFiles(folder, config.text_column, config.encoding, preparation)
    left_out = f"; left out: {found.left_out}" if found.left_out else ""
    if not found.files:
        raise DataError(f"{config.source} has no file that holds text{left_out}; give --data another folder, or a file")
    description = f"{config.source}, {counted(len(found.files), 'file')}{left_out}"
    return _of_files(found.files, config, description, config.encoding, preparation)


def _saved_dataset(splits: dict[str, list[DataFile]], config: DataConfig, preparation: Preparation) -> Source:
    split = next(iter(splits)) if list(splits) == [""] else config.split
    held_out = _held_out(splits, split, config.source)
    description = f"{config.source} ({split})" if split else config.source
    validation = splits[held_out] if held_out is not None else None
    return _of_files(splits[split], config, description, UTF8, preparation, validation)


def _of_files(
    files: list[DataFile],
    config: DataConfig,
    description: str,
    encoding: str,
    preparation: Preparation,
    validation: list[DataFile] | None = None,
) -> Source:
    every = [*files, *(validation or [])]
    paths, kinds = [file.path for file in every], [file.kind for file in every]
    sizes = [path.stat().st_size for path in paths]
    total = sum(sizes)
    whole = set(kinds) == {"text"}  # each file is a document

    def look() -> tuple[str, bool]:
        return content_digest(paths, sizes), whole and any(compression(head_of(path)) for path in paths)

    content, packed = preparation.of_content("digest", paths, look)
    if len(set(kinds)) > 1 or validation is not None:  # the same bytes may be other documents
        content = digest(content, kinds, len(files))
    identity = {"kind": ", ".join(sorted(set(kinds))), "files": len(paths), "bytes": total, "content": content}
    return Source(
        description=description,
        fingerprint=digest(
            identity, encoding, None if whole else config.text_column, stats(paths) if total > WHOLE_BYTES else None
        ),
        identity=identity,
        training=FileDocuments(files, config.text_column, encoding, description),
        validation=FileDocuments(validation, config.text_column, encoding, description) if validation else None,
        single=whole and len(paths) == 1,
        total_bytes=total if whole and not packed else None,
    )


def _matches(pattern: str) -> list[Path]:
    """The files that `pattern` names, under the names that it gives: a link may lead to a file of any name."""
    exact = Path(os.path.expanduser(pattern))  # noqa: PTH111 - see absolute_source
    names = [exact] if exact.exists() else glob.glob(str(exact), recursive=True)  # noqa: PTH207 - absolute patterns
    paths = sorted(Path(name).absolute() for name in names if Path(name).is_file())
    if not paths and glob.has_magic(pattern):
        raise MissingTextError(f"no file matches {pattern}; check the glob given to --data")
    if not paths:
        why = f"{pattern} is no ordinary file" if exact.exists() else f"there is no file {pattern}"
        raise MissingTextError(
            f"{why}; give --data a file, a glob, a folder, https://…, {HUB_PREFIX}OWNER/NAME, or {STDLIB}"
        )
    return paths


def _kind(path: Path, encoding: str) -> str:
    """The reader of a file. Raises DataError if its ending says nothing and it is binary."""
    kind = kind_by_name(path.name)
    if kind is None:
        check_is_text(path, encoding)
    return kind or "text"


def _hub(config: DataConfig) -> Source:
    matched = re.fullmatch(r"([\w.-]+(?:/[\w.-]+)?)(?::(.+))?", config.source.removeprefix(HUB_PREFIX))
    if not matched:
        raise DataError(f"{config.source} names no dataset; write --data {HUB_PREFIX}OWNER/NAME or OWNER/NAME:CONFIG")
    name, configuration = matched.groups()
    splits = load_hub_dataset(name, configuration, streaming=config.streaming)
    held_out = _held_out(splits, config.split, name)

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


def _held_out(splits: Collection[str], split: str, name: str) -> str | None:
    """The split to validate on, if the data comes with one. Raises DataError if `split` is not one of `splits`."""
    if split not in splits:
        raise DataError(f"{name} has no split {split!r}; choose --data-split from {', '.join(splits)}")
    return next((key for key in VALIDATION_SPLITS if key in splits and key != split), None)


def _cached_files(splits: Any) -> list[str]:
    """The files in which `datasets` keeps the splits; their paths hold the revision. There are none for a stream."""
    return [file["filename"] for split in splits.values() for file in getattr(split, "cache_files", [])]
