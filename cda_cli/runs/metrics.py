"""metrics.jsonl: the records of a run, one JSON object a line, oldest first."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from cda_cli import strict_json
from cda_cli.errors import StorageError
from cda_cli.runs.records import VERSION, Record, SchemaRecord, from_json, numbers, to_json
from cda_cli.storage import write_file

R = TypeVar("R", bound=Record)


def read_metrics(path: Path) -> Iterator[Record]:
    """The records of a metrics file; lines that are damaged, or of a kind that is not known, are left out."""
    for values in _read_objects(path):
        record = from_json(values)
        if record is not None:
            yield record


def read_kind(path: Path, kind: type[R], *, newest_first: bool = False, most: int | None = None) -> Iterator[R]:
    """The records of one kind, or at most `most` of them, evenly spread.

    It is many times faster than to read all records, as it passes over the other lines.
    """
    for values in _read_objects(path, f'"{kind.kind}"'.encode(), newest_first, most):
        record = from_json(values)
        if isinstance(record, kind):
            yield record


def count_damaged(path: Path) -> int:
    """The lines of a metrics file that are no object by their look, as where a disk lost a block.

    It reads none of them, which would take many times longer. A last line without its end is not damaged: a run may be
    writing it, and a kill may have cut it.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if _is_own_file(path) else []
    return sum(not (line.startswith(b"{") and line.endswith(b"}")) or b"\0" in line for line in lines)


class Tracker(Protocol):
    """Where the numbers of a run also go."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Writes the records of a run to its metrics file, and their numbers to trackers.

    The lines of steps after `resumed_step`, which are about to be done again, are dropped. The others stay as they are,
    also where another version of `cda` wrote them.
    """

    def __init__(self, path: Path, resumed_step: int, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers
        kept = [values for values in _read_objects(path) if values["step"] <= resumed_step]
        versions = [record.version for record in map(from_json, kept) if isinstance(record, SchemaRecord)]
        if versions[-1:] != [VERSION]:
            kept.append(to_json(SchemaRecord(step=resumed_step, version=VERSION)))
        write_file(path, "".join(strict_json.dumps(values) + "\n" for values in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Raises StorageError where the disk is full."""
        try:
            self._file.write(strict_json.dumps(to_json(record)) + "\n")
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{self._file.name} cannot be written ({error.strerror}); free some space and start again to resume"
            ) from error
        if self._trackers and (found := numbers(record)):
            for tracker in self._trackers:
                tracker.log(record.step, found)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()
        # `write` has already reported what could not be flushed.
        with contextlib.suppress(OSError):
            self._file.close()


class NullMetrics(Metrics):
    """For a process that does not write."""

    def __init__(self) -> None: ...

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


def _read_objects(
    path: Path, word: bytes = b"", newest_first: bool = False, most: int | None = None
) -> Iterator[dict[str, Any]]:
    """The JSON objects with a step, of the lines that hold `word`, or of at most `most` of these.

    A line that a kill cut short or a disk damaged is left out; a link is no file.
    """
    if not _is_own_file(path):
        return
    # Only \n ends a record: its text may hold U+2028, U+0085 and the other line ends of `splitlines`.
    lines = [line for line in path.read_bytes().split(b"\n") if word in line]
    if newest_first:
        lines.reverse()
    for line in lines[:: max(1, -(-len(lines) // most))] if most else lines:
        try:
            values = json.loads(line.decode("utf-8", errors="replace"))
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            yield values


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
