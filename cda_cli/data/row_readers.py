"""A local file → its rows. A reader looks at the text of a row only; other columns may be of any type, or missing.

A reader takes (path, column, encoding, start) and yields (row, text) for each row after the first `start`. `row` is the
number of rows up to and with this one; `text` is that in the column, or None. Rows are counted so that reading can
resume at any of them. Readers raise DataError with the file and the line.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from cda_cli.data.files import compression, file_errors, head_of, open_text
from cda_cli.errors import DataError, brief

Rows = Iterator[tuple[int, "str | None"]]

BATCH_ROWS = 256
COLUMNS_NAMED = 20
PROBED_ROWS = 256
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
FIELD_CHARACTERS = 2**31 - 1
JSON_CHARACTERS = 1 << 20
_SPACES = re.compile(r"[ \t\n\r]*")
# Whole numbers become floats: nobody asks for them, and `int` refuses those of many digits.
_json = json.JSONDecoder(parse_int=float)


class NoTableError(DataError):
    """The content of a file is not a table of text, whatever its name says."""


class NoColumnError(DataError):
    """A table has no column of the name that was asked for."""


def read_text(path: Path, column: str, encoding: str, start: int) -> Rows:
    """The whole file is a single row. Every line ending stays as it is."""
    if start == 0:
        with open_text(path, encoding, newline="") as file:
            yield 1, file.read()


def read_json_lines(path: Path, column: str, encoding: str, start: int) -> Rows:
    """Each line is a row. A blank line counts as a row without text."""
    with open_text(path, encoding, newline="\n") as file:
        text_of = _Column(path, column, from_start=start == 0)
        for number, line in enumerate(islice(file, start, None), start + 1):
            if line.isspace():
                continue
            try:
                row = _json.decode(line)
            except (ValueError, RecursionError) as error:
                raise _not_json(path, number, _fault_of(error)) from error
            yield number, text_of(row, f"line {number}")
        text_of.finish()


def read_json(path: Path, column: str, encoding: str, start: int) -> Rows:
    """Each value of a JSON array is a row, or each of several JSON values. A value may span lines."""
    with open_text(path, encoding, newline="\n") as file:
        text_of = _Column(path, column, from_start=start == 0)
        for number, row in enumerate(islice(_json_values(path, file), start, None), start + 1):
            yield number, text_of(row, f"row {number}")
        text_of.finish()


def read_csv(path: Path, column: str, encoding: str, start: int) -> Rows:
    """Each record is a row, its cells as they are written. The first record names the columns; blank lines are none."""
    csv.field_size_limit(FIELD_CHARACTERS)
    with open_text(path, encoding, newline="") as file:
        reader = csv.reader(_with_nul(file), strict=True)
        try:
            records = (record for record in reader if record)
            names = next(records, [])
            if not names:
                return
            if column not in names:
                raise _no_column(path, column, names)
            place = names.index(column)
            for number, record in enumerate(records, 1):
                if len(record) > len(names):
                    raise DataError(
                        f"line {reader.line_num} of {path} has {len(record)} fields, and its first line names "
                        f"{len(names)} columns; put quotes around text that holds commas"
                    )
                if number > start:
                    yield number, _restore_nul(record[place]) if place < len(record) else None
        except csv.Error as error:
            raise NoTableError(
                f"line {reader.line_num} of {path} is not CSV ({brief(error)}); mend it, or give --data another file"
            ) from error


def read_parquet(path: Path, column: str, encoding: str, start: int) -> Rows:
    """Reads the rows of every row group, and no other column."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        if packed := compression(head_of(path)):
            raise DataError(f"{path} is compressed with {packed}, which a .parquet is not read with; unpack it")
        with pq.ParquetFile(path) as file:
            if not file.metadata.num_rows:
                return
            _check_arrow_column(path, column, file.schema_arrow)
            done = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if done + rows <= start:
                    done += rows
                    continue
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False):
                    for text in _texts(batch.column(0)):
                        done += 1
                        if done > start:
                            yield done, text
    except file_errors() as error:
        raise DataError(f"{path} cannot be read ({brief(error)}); mend the file, or give --data another") from error


def read_arrow(path: Path, column: str, encoding: str, start: int) -> Rows:
    """Reads the record batches of an Arrow stream, as `datasets.save_to_disk` writes it."""
    import pyarrow as pa

    try:
        with path.open("rb") as end:
            end.seek(max(path.stat().st_size - len(ARROW_END), 0))
            if end.read() != ARROW_END:
                raise EOFError("it is cut off")  # the library would take the rows so far for all of them
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            _check_arrow_column(path, column, stream.schema)
            done = 0
            for batch in stream:
                skipped = min(max(start - done, 0), batch.num_rows)
                done += skipped
                for text in _texts(batch.column(column)[skipped:]):
                    done += 1
                    yield done, text
    except file_errors() as error:
        raise DataError(f"{path} cannot be read ({brief(error)}); mend the file, or give --data another") from error


READERS: dict[str, Callable[[Path, str, str, int], Rows]] = {
    "text": read_text,
    "jsonl": read_json_lines,
    "json": read_json,
    "csv": read_csv,
    "parquet": read_parquet,
    "arrow": read_arrow,
}
TEXT_ENDINGS = (".txt", ".py", ".md", ".rst", ".html", ".tex", ".log")
KINDS = dict.fromkeys(TEXT_ENDINGS, "text") | {
    ".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet",
}  # fmt: skip
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")


def kind_by_name(name: str) -> str | None:
    """The reader that the ending of a file's name asks for; None if the content must tell whether it is text."""
    stem, ending = os.path.splitext(name.lower())  # noqa: PTH122 - a name, not a path
    if ending in PACKED:
        ending = os.path.splitext(stem)[1] or ".txt"  # noqa: PTH122
    return KINDS.get(ending)


def probe(path: Path, kind: str, column: str, encoding: str) -> None:
    """Reads a table up to its first text, or PROBED_ROWS rows of it; a file of text is not read.

    Raises NoTableError, NoColumnError if the table lacks `column`, which a table of JSON shows at its end only, and
    DataError if it cannot be read.
    """
    for _, text in islice(READERS[kind](path, column, encoding, 0), PROBED_ROWS if kind != "text" else 0):
        if text is not None:
            return


class _Column:
    """Finds the text of JSON rows. A row need not have the column, but some row of a file must."""

    def __init__(self, path: Path, column: str, *, from_start: bool) -> None:
        self._path, self._column = path, column
        self._seen = not from_start  # the rows before may have had it
        self._names: dict[str, None] = {}

    def __call__(self, row: Any, place: str) -> str | None:
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise NoTableError(
                f"{place} of {self._path} is {_json_type(row)}, not an object; mend it, or give --data another file"
            )
        if not self._seen:
            self._seen = self._column in row
            self._names.update(dict.fromkeys(row))
        text = row.get(self._column)
        if text is None:
            return None
        if not isinstance(text, str):
            raise _not_text(self._path, self._column, _json_type(text), f" in {place}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an escape such as \\ud83d on its own
            raise DataError(
                f"{place} of {self._path} holds half of a surrogate pair, which is no character; mend it, or give "
                "--data another file"
            ) from error
        return text

    def finish(self) -> None:
        """Raises NoColumnError if there were rows, and none had the column."""
        if not self._seen and self._names:
            raise _no_column(self._path, self._column, list(self._names))


def _json_values(path: Path, file: TextIO) -> Iterator[Any]:
    """The elements of the array in `file`, or the values in it one after another."""
    source = _JsonText(path, file)
    array = source.take("[")
    closed = not array or source.take("]")
    while source.peek() and not (array and closed):
        yield source.value()
        closed = not array or source.take("]")
        if not closed and not source.take(","):
            raise source.fault("Expecting ',' or ']'")
    if not closed or source.peek():
        raise source.fault("The end of the array is not that of the file")


class _JsonText:
    """The text of a JSON file. It holds no more than the next value, and a part of fixed size."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._text, self._at = "", 0
        self._line = 1  # that the text begins in

    def peek(self) -> str:
        """The next character that is no space, or "" at the end."""
        while True:
            self._at = _SPACES.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._read_on():
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> bool:
        """Whether the next character is this one; if so, reading passes over it."""
        taken = self.peek() == character
        self._at += taken
        return taken

    def value(self) -> Any:
        while True:
            try:
                value, self._at = _json.raw_decode(self._text, self._at)
                return value
            except (ValueError, RecursionError) as error:  # perhaps only cut off by the end of what was read
                fault = self.fault(_fault_of(error), error.pos if isinstance(error, json.JSONDecodeError) else None)
                if not self._read_on():
                    raise fault from error

    def fault(self, message: str, at: int | None = None) -> NoTableError:
        line = self._line + self._text.count("\n", 0, self._at if at is None else at)
        return _not_json(self._path, line, message)

    def _read_on(self) -> bool:
        self._line += self._text.count("\n", 0, self._at)
        self._text, self._at = self._text[self._at :], 0
        more = self._file.read(max(JSON_CHARACTERS, len(self._text)))
        self._text += more
        return bool(more)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "a string"}
    return names.get(type(value), "a number")


def _check_arrow_column(path: Path, column: str, schema: Any) -> None:
    if column not in schema.names:
        raise _no_column(path, column, schema.names)
    if not _holds_text(held := schema.field(column).type):
        raise _not_text(path, column, str(held))


def _texts(values: Any) -> list[str | None]:
    """The strings of an Arrow array."""
    import pyarrow as pa

    texts: list[str | None] = values.cast(pa.large_string()).to_pylist()
    return texts


def _holds_text(held: Any) -> bool:
    """Whether an Arrow type is one of strings, or of nothing but nulls. A dictionary has a value_type."""
    return str(getattr(held, "value_type", held)) in ("string", "large_string", "string_view", "null")


def _fault_of(error: ValueError | RecursionError) -> str:
    """What is wrong, without the library's place, which counts in the part that it was given."""
    return error.msg if isinstance(error, json.JSONDecodeError) else brief(error)


def _not_json(path: Path, line: int, message: str) -> NoTableError:
    return NoTableError(f"line {line} of {path} is not JSON ({message}); mend it, or give --data another file")


def _not_text(path: Path, column: str, held: str, place: str = "") -> NoTableError:
    return NoTableError(f"the column {column!r} of {path} holds {held}{place}, not text; choose another --text-column")


def _no_column(path: Path, column: str, names: list[str]) -> NoColumnError:
    more = ", …" if len(names) > COLUMNS_NAMED else ""
    return NoColumnError(
        f"{path} has no column {column!r}; choose --text-column from {', '.join(names[:COLUMNS_NAMED])}{more}"
    )


if sys.version_info >= (3, 11):

    def _with_nul(file: TextIO) -> Iterator[str]:
        return file

    def _restore_nul(text: str) -> str:
        return text

else:  # `csv` refuses NUL there; a lone surrogate, which no decoded text holds, stands in for it

    def _with_nul(file: TextIO) -> Iterator[str]:
        return (line.replace("\0", "\ud800") for line in file)

    def _restore_nul(text: str) -> str:
        return text.replace("\ud800", "\0")
