"""A folder → the files in it that hold text, or those of a dataset that `datasets.save_to_disk` wrote."""

from __future__ import annotations

import json
import os
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from cda_cli.data.cache import Preparation
from cda_cli.data.documents import DataFile
from cda_cli.data.files import NotTextError, check_is_text
from cda_cli.data.row_readers import NoColumnError, NoTableError, kind_by_name, probe
from cda_cli.errors import DataError, brief
from cda_cli.plurals import counted
from cda_cli.storage import holds_run

SPLITS_FILE = "dataset_dict.json"
DATASET_FILES = ("dataset_info.json", "state.json")


class FolderFiles:
    """The files of text in `folder` and below it, sorted by their path, and what was left out.

    A file of unknown ending is left out unless its beginning is text in `encoding`, a table if it lacks `column`
    or its beginning is not a table of text. A link to a folder is followed, but each folder is read once, so a loop of
    links ends. The folder of a run below `folder` is left out, so that the text stays the same while a run writes
    there. Raises OSError, and DataError for a file that its ending calls text or a table and that cannot be read.
    """

    def __init__(self, folder: Path, column: str, encoding: str, preparation: Preparation) -> None:
        self._left_out: Counter[str] = Counter()
        self._runs = 0
        self.files: list[DataFile] = []
        paths = sorted(self._paths(folder), key=lambda path: path.relative_to(folder).as_posix())
        looked = preparation.of_content(
            f"kinds {column} {encoding}", paths, lambda: [_kind_or_fault(path, column, encoding) for path in paths]
        )
        for path, (kind, fault) in zip(paths, looked, strict=True):
            if fault:
                self._left_out[fault] += 1
            else:
                self.files.append(DataFile(path, kind))

    @property
    def left_out(self) -> str:
        """What was left out, in words; "" if nothing was."""
        words = [f"{count} {what}" for what, count in sorted(self._left_out.items())]
        return ", ".join([*words, counted(self._runs, "run")] if self._runs else words)

    def _paths(self, folder: Path) -> Iterator[Path]:
        seen: set[tuple[int, int]] = set()
        waiting, links = [folder], deque[Path]()
        while waiting or links:  # links come last, so that a folder is read under its own name
            here = waiting.pop() if waiting else links.popleft()
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                self._left_out["linked again"] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(here.iterdir(), reverse=True)
            if here != folder and holds_run({path.name for path in entries}):
                self._runs += 1
                continue
            for path in entries:
                if path.name.startswith("."):
                    self._left_out["hidden"] += 1
                elif path.is_dir():
                    (links if path.is_symlink() else waiting).append(path)
                elif not path.is_file():
                    self._left_out["broken or special"] += 1
                elif path.stat().st_size:
                    yield path


def _kind_or_fault(path: Path, column: str, encoding: str) -> tuple[str, str]:
    """The reader of a file, and why it is left out, or ""."""
    kind = kind_by_name(path.name)
    if kind is None:
        kind = "text"
        try:
            check_is_text(path, encoding)
        except NotTextError:
            return kind, "binary"
    try:
        probe(path, kind, column, encoding)
    except NoColumnError:
        return kind, f"without a column {column!r}"
    except NoTableError:
        return kind, "not a table of text"
    return kind, ""


def saved_splits(folder: Path) -> dict[str, list[DataFile]] | None:
    """The Arrow files of each split that `datasets.save_to_disk` wrote into `folder`; None if it wrote nothing there.

    A Dataset without splits has the single split "". Raises DataError if a file of its own is damaged.
    """
    try:
        if (folder / SPLITS_FILE).is_file():
            names = json.loads((folder / SPLITS_FILE).read_text(encoding="utf-8"))["splits"]
            return {str(name): _arrow_files(folder / str(name)) for name in names}
        if all((folder / name).is_file() for name in DATASET_FILES):
            return {"": _arrow_files(folder)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{folder} looks like a dataset of save_to_disk and cannot be read ({brief(error)}); save it anew, or give "
            "--data other files"
        ) from error
    return None


def _arrow_files(folder: Path) -> list[DataFile]:
    state = json.loads((folder / DATASET_FILES[1]).read_text(encoding="utf-8"))
    return [DataFile(folder / os.fspath(entry["filename"]), "arrow") for entry in state["_data_files"]]
