"""Rows of numbers as CSV, from which they read back as they were."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar, get_type_hints

from cda_cli.errors import DataError

R = TypeVar("R")
G = TypeVar("G", bound=Hashable)


def to_csv(rows: Sequence[Any]) -> str:
    """Writes NamedTuples of one type, with their fields as header. NaN is an empty cell.

    Lines end as in RFC 4180. With another end the module `csv` does not quote a carriage return, which may be a token.
    """
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(rows[0]._fields)
    writer.writerows([["" if cell != cell else cell for cell in row] for row in rows])
    return file.getvalue()


def from_csv(text: str, kind: type[R]) -> list[R]:
    """Reads what `to_csv` wrote. Raises DataError for another file."""
    types = get_type_hints(kind)
    header, *lines = list(csv.reader(io.StringIO(text, newline=""))) or [[]]
    if header != list(types) or not lines:
        raise DataError(f"this is no CSV file of that figure, whose columns are {', '.join(types)}; give that one")
    try:
        return [kind(*(_cell(cell, types[name]) for name, cell in zip(header, line, strict=True))) for line in lines]
    except ValueError as error:
        raise DataError(f"a cell of the CSV file cannot be read ({error}); write the file anew") from error


def _cell(text: str, kind: type[Any]) -> Any:
    return math.nan if kind is float and not text else kind(text)


def grouped(rows: Iterable[R], by: Callable[[R], G]) -> dict[G, list[R]]:
    """The rows of each group, in the order in which they come."""
    groups: dict[G, list[R]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups
