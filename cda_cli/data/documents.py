"""The documents of a source: an iterable of texts in a fixed order, which can resume after any of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cda_cli.data.hub import quiet_libraries, read_errors
from cda_cli.data.row_readers import READERS
from cda_cli.errors import DataError, brief

Position = dict[str, Any]


class Documents(ABC):
    """The texts of a source in a fixed order, each a str. Empty documents are left out."""

    @abstractmethod
    def read(self, position: Position | None = None) -> Iterator[tuple[str, Position]]:
        """Each document after `position` (None: from the start) with the position after it, a plain JSON value.

        Raises DataError.
        """

    def __iter__(self) -> Iterator[str]:
        """Every document. Raises DataError."""
        return (text for text, _ in self.read())


class DataFile(NamedTuple):
    """A local file; `kind` names its reader in READERS."""

    path: Path
    kind: str


class FileDocuments(Documents):
    """The rows of local files, one file after another.

    A position is the number of a file and the number of its rows that were read.
    """

    def __init__(self, files: list[DataFile], column: str, encoding: str, where: str) -> None:
        self._files = files
        self._column = column
        self._encoding = encoding
        self._where = where

    def read(self, position: Position | None = None) -> Iterator[tuple[str, Position]]:
        first, start = self._check(position) if position is not None else (0, 0)
        for number, (path, kind) in enumerate(self._files[first:], first):
            for row, text in READERS[kind](path, self._column, self._encoding, start):
                if text:
                    yield text, {"file": number, "row": row}
            start = 0

    def _check(self, position: Position) -> tuple[int, int]:
        first, start = (position.get(name) for name in ("file", "row"))
        if type(first) is not int or type(start) is not int or not 0 <= first < len(self._files) or start < 0:
            raise _no_position(self._where)
        return first, start


class DatasetDocuments(Documents):
    """The rows of a hub dataset, mapped or iterable, which `open_rows` opens. `column` holds the text."""

    def __init__(self, open_rows: Callable[[], Any], column: str, where: str) -> None:
        self._open_rows = open_rows
        self._column = column
        self._where = where

    def __iter__(self) -> Iterator[str]:
        return filter(None, map(self._text, self._rows(self._open())))

    def read(self, position: Position | None = None) -> Iterator[tuple[str, Position]]:
        """As `Documents.read`, for an iterable dataset."""
        rows = self._open()
        if position is not None:
            try:
                rows.load_state_dict(position)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise _no_position(self._where) from error
        for row in self._rows(rows):
            if text := self._text(row):
                yield text, rows.state_dict()

    def _open(self) -> Any:
        rows = self._open_rows()
        names = rows.column_names
        if names is not None:
            self._check_column(names)
            return rows.select_columns(self._column)
        # A loaded position stays in the object, and a later pass would start there, so each pass takes a new object.
        return rows.with_format(None)

    def _rows(self, rows: Any) -> Iterator[dict[str, Any]]:
        try:
            with quiet_libraries():
                yield from rows
        except read_errors() as error:
            raise DataError(
                f"{self._where} cannot be read ({brief(error)}); mend the file, or give --data another"
            ) from error

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


def _no_position(where: str) -> DataError:
    return DataError(f"the saved position in {where} is not one of it; use an earlier one")
