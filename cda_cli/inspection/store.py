"""The store of rows: the weights that each head gives over one window, in few bytes.

Of each row the largest weights are kept, and what the others sum to. docs/inspection.md has the layout in bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cda_cli.errors import ConfigError, DataError
from cda_cli.inspection.row_codes import RowArrays, decode, inflate

MAGIC = b"CDAROWS\x01"
LARGEST = 2**31  # tokens of a window, by far
STREAMS = ("rows", "thumbnail")
UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


class StoredRow(NamedTuple):
    """One row: the kept keys in order, [n], with their weights λ, and whether each is capped.

    A key is its place in the window, counted from 0; null keys are −1, −2 … Capped weights are exactly 1 and others
    exact to 1.4 %, `sparsity_k` to 0.3 % for each octave of it in the head, and `rest`, what the weights of all other
    keys sum to, to 0.2 % of k.
    """

    keys: NDArray[np.int64]
    weights: NDArray[np.float64]
    capped: NDArray[np.bool_]
    sparsity_k: float
    rest: float


@dataclass(frozen=True)
class StoredHead:
    """One head. `rows` and `thumbnail` are its streams, deflated.

    A row has `most_keys` keys or fewer. `kept` is the share of the mass that they have, the mean over rows. The k of
    its rows are within `smallest_k` and `largest_k`.
    """

    layer: int
    head: int
    most_keys: int
    kept: float
    smallest_k: float
    largest_k: float
    rows: bytes
    thumbnail: bytes


class RowStore:
    """The rows of the first `queries` queries of a window of `tokens` tokens, before which stand `null_keys`.

    `keep` is the share of the mass of a row that is kept where the bytes allow it.
    """

    def __init__(self, tokens: int, queries: int, null_keys: int, keep: float, heads: Iterable[StoredHead]) -> None:
        self.tokens, self.queries, self.null_keys, self.keep = tokens, queries, null_keys, keep
        self.heads: Mapping[tuple[int, int], StoredHead] = {(head.layer, head.head): head for head in heads}
        self._decoded: tuple[StoredHead, RowArrays] | None = None

    def rows(self, layer: int, head: int) -> RowArrays:
        """Returns all rows of a head, with `rest` as it is and not as a share. Raises ConfigError if it has no such.

        Those of the last head that was asked for are kept.
        """
        stored = self._head(layer, head)
        if self._decoded is None or self._decoded[0] is not stored:
            keys = self.queries + self.null_keys
            try:
                rows = decode(stored.rows, self.queries, keys, stored.smallest_k, stored.largest_k)
            except ValueError as error:
                raise _damaged() from error
            bound = np.minimum(rows.k, np.arange(self.queries) + 1 + self.null_keys)
            self._decoded = stored, rows._replace(rest=rows.rest * bound)
        return self._decoded[1]

    def row(self, layer: int, head: int, query: int) -> StoredRow:
        """Returns one row. Raises ConfigError if the store has no such head or query."""
        rows = self.rows(layer, head)
        if not 0 <= query < self.queries:
            raise ConfigError(f"the store has no query {query}; its queries are 0 to {self.queries - 1}")
        start = int(rows.length[:query].sum())
        span = slice(start, start + int(rows.length[query]))
        distance, weights, capped = (each[span][::-1] for each in (rows.distance, rows.weight, rows.capped))
        return StoredRow(query - distance, weights, capped, float(rows.k[query]), float(rows.rest[query]))

    def thumbnail(self, layer: int, head: int) -> NDArray[np.uint8]:
        """The largest weight in each cell of a coarse map, as codes [n, n], queries down; n is 64, or fewer queries.

        255 is a capped key and 0 a weight below 2^−10; other codes c are 2^(10 · (c − 254)/254).
        """
        side = thumbnail_side(self.queries)
        try:
            cells = np.frombuffer(inflate(self._head(layer, head).thumbnail, side**2), np.uint8)
            return cells.reshape(side, side)
        except ValueError as error:
            raise _damaged() from error

    def header(self) -> dict[str, Any]:
        """What it says in front of the streams, as JSON; each stream by its place among them and its length."""
        heads, place = [], 0
        for head in self.heads.values():
            described: dict[str, Any] = {
                "layer": head.layer,
                "head": head.head,
                "most_keys": head.most_keys,
                "kept": round(head.kept, 6),
                "smallest_k": head.smallest_k,
                "largest_k": head.largest_k,
            }
            for name in STREAMS:
                described[name] = [place, len(getattr(head, name))]
                place += len(getattr(head, name))
            heads.append(described)
        sizes = {"tokens": self.tokens, "queries": self.queries, "null_keys": self.null_keys, "keep": self.keep}
        return {**sizes, "heads": heads}

    def to_bytes(self) -> bytes:
        """The store as one file, which `from_bytes` reads."""
        header = json.dumps(self.header(), separators=(",", ":")).encode()
        streams = [getattr(head, name) for head in self.heads.values() for name in STREAMS]
        return b"".join([MAGIC, len(header).to_bytes(4, "little"), header, *streams])

    @classmethod
    def from_bytes(cls, content: bytes) -> RowStore:
        """Reads what `to_bytes` returned. Raises DataError for anything else."""
        begin = len(MAGIC) + 4
        try:
            if content[: len(MAGIC)] != MAGIC:
                raise ValueError("it begins otherwise")
            streams = begin + int.from_bytes(content[len(MAGIC) : begin], "little")
            header = json.loads(content[begin:streams])
            if not isinstance(header, dict) or not header["heads"]:
                raise ValueError("it describes no heads")
            heads = []
            for described in header.pop("heads"):
                for name in STREAMS:
                    place, length = described[name]
                    described[name] = content[streams + place : streams + place + length]
                    if len(described[name]) != length:
                        raise ValueError("it ends early")
                heads.append(StoredHead(**described))
            sizes = (header[name] for name in ("tokens", "queries", "null_keys"))
            if not all(isinstance(size, int) and 0 <= size <= LARGEST for size in sizes):
                raise ValueError("its sizes are no numbers")
            return cls(**header, heads=heads)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _damaged() from error

    def _head(self, layer: int, head: int) -> StoredHead:
        if (layer, head) not in self.heads:
            last = "{}.{}".format(*max(self.heads))
            raise ConfigError(f"the store has no head {layer}.{head}; its last one is {last}, and both count from 0")
        return self.heads[layer, head]


def thumbnail_side(queries: int) -> int:
    """The number of rows, and of columns, of the coarse map."""
    return min(64, queries)


def parse_size(size: str | int) -> int:
    """Reads a number of bytes, such as "12MB". Raises ConfigError for what is none, or not above 0."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?B|)\s*", str(size))
    read = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if read < 1:
        raise ConfigError(f"{size!r} is no size; write a number of bytes such as 12MB or 800kB")
    return read


def _damaged() -> DataError:
    return DataError("this is no store of rows, or it is damaged; make it again from the model")
