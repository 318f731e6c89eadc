"""Tables of a report, which NumPy, pandas, and whatever reads Arrow take without a copy of the whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Columns = Mapping[str, NDArray[Any]]


class Table:
    """Columns of equal length, which are made when they are asked for.

    `parts` yields one or more groups of rows, all with the same columns. DuckDB, Polars, PyArrow, pandas and others
    read a table through `__arrow_c_stream__`, a group at a time: `polars.DataFrame(report.heads)`.
    """

    def __init__(self, parts: Callable[[], Iterator[Columns]]) -> None:
        self._parts = parts

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(next(self._parts()))

    def __len__(self) -> int:
        return sum(len(next(iter(part.values()))) for part in self._parts())

    def __repr__(self) -> str:
        return f"<Table of {len(self):,} rows: {', '.join(self.columns)}>"

    def numpy(self) -> dict[str, NDArray[Any]]:
        """All columns by name."""
        parts = list(self._parts())
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def pandas(self) -> Any:
        """The table as a data frame of pandas."""
        import pandas  # type: ignore[import-untyped]

        return pandas.DataFrame(self.numpy())

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        """The table as a stream of Arrow (the PyCapsule interface)."""
        import pyarrow  # type: ignore[import-untyped]

        batches = (pyarrow.RecordBatch.from_pydict(dict(part)) for part in self._parts())
        first = next(batches)

        def all_batches() -> Iterator[Any]:
            yield first
            yield from batches

        reader = pyarrow.RecordBatchReader.from_batches(first.schema, all_batches())
        return reader.__arrow_c_stream__(requested_schema)
