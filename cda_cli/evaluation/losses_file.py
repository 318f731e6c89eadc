"""The file of `cda eval --losses`: a JSON line for each document or window, from which an evaluation goes on.

Each checkpoint has a line that says what was evaluated and how, and after it the lines of its documents, or of its
windows where the text is not evaluated by document. A line is written as soon as all its windows are done, so a kill
loses at most the last line, and what had not ended. Shapes: W windows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from cda_cli import strict_json
from cda_cli.data import Tokenizer, Windows, count_words
from cda_cli.errors import ConfigError, StorageError
from cda_cli.evaluation.evaluate import bits_per_byte
from cda_cli.evaluation.sums import Sums
from cda_cli.storage import is_device_or_pipe

CHECKPOINT = "checkpoint"  # the key that only the first line of a checkpoint has
BEGINNING = f'{{"{CHECKPOINT}": "'.encode()  # of each file


class LossesFile:
    """The lines that are in a file, and those that are added to it."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self._file = path, file
        file.seek(0)
        whole = file.read()
        end = whole.rfind(b"\n") + 1
        self._sections: list[list[dict[str, Any]]] = []
        for number, line in enumerate(whole[:end].splitlines(), start=1):
            values = self._parsed(number, line)
            if CHECKPOINT in values:
                self._sections.append([])
            elif not self._sections:
                raise self._foreign(number)
            self._sections[-1].append(values)
        if not self._sections and not BEGINNING.startswith(whole[: len(BEGINNING)]):
            raise self._foreign(1)
        file.truncate(end)  # A kill can cut the last line short.
        file.seek(end)

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[LossesFile]:
        """Opens the file at `path`, or makes it. Raises ConfigError if it is no file or holds something else.

        Raises StorageError if it cannot be opened.
        """
        if is_device_or_pipe(path):
            raise ConfigError(f"{path} is no ordinary file; give --losses the name of one")
        try:
            file = path.open("r+b" if path.exists() else "w+b")
        except OSError as error:
            raise StorageError(
                f"{path} cannot be opened ({error.strerror}); give --losses a file that can be written"
            ) from error
        with file:
            yield cls(path, file)

    def section(self, number: int, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The lines that are there for the checkpoint of this number; it makes their first line if there is none.

        Raises ConfigError if they are of another evaluation than `settings` say.
        """
        if number == len(self._sections):
            self.write(settings)
            self._sections.append([dict(settings)])
        (first, *lines) = self._sections[number]
        for name, value in settings.items():
            if name != CHECKPOINT and first.get(name) != value:
                raise ConfigError(
                    f"{self.path} has the losses of another evaluation, with {name} {_words(first.get(name))} in place "
                    f"of {_words(value)}; give --losses another file"
                )
        return lines

    def is_last(self, number: int) -> bool:
        return number == len(self._sections) - 1

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line. Raises StorageError where the disk is full."""
        try:
            self._file.write((strict_json.dumps(line) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{self.path} cannot be written ({error.strerror}); free some space, and run the command again to go on"
            ) from error

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            values = json.loads(line)
        except ValueError:
            values = None
        if not isinstance(values, dict):
            raise self._foreign(number)
        return values

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(f"line {number} of {self.path} is no line of --losses; give --losses another file")


class CheckpointLines:
    """The lines of one checkpoint: those that were there, as sums, and those of the windows that are measured now.

    A line has the windows of a document, or a single window; `names` are those of the ways after the first one.
    """

    def __init__(
        self,
        file: LossesFile,
        number: int,
        settings: Mapping[str, Any],
        windows: Windows,
        names: Sequence[str],
        by_document: Tokenizer | None,
    ) -> None:
        self._file, self._windows, self._names, self._tokenizer = file, windows, names, by_document
        groups = np.arange(len(windows)) if by_document is None else windows.document
        self._ends = np.searchsorted(groups, np.arange(groups[-1] + 1), side="right")
        lines = file.section(number, settings)
        if len(lines) > len(self._ends) or (len(lines) < len(self._ends) and not file.is_last(number)):
            raise ConfigError(f"{file.path} is damaged, as lines of a checkpoint are gone; give --losses another file")
        self._written = len(lines)
        self.done = int(self._ends[self._written - 1]) if lines else 0
        self.sums = self._read(lines) if lines else []
        self._pending: list[list[Sums]] = []

    def _read(self, lines: Sequence[Mapping[str, Any]]) -> list[Sums]:
        """The sums of the windows that are done, in each way."""
        done = self._windows.take(slice(self.done))
        tokens, text_bytes = torch.from_numpy(done.target_counts()), torch.from_numpy(done.target_bytes())
        found = []
        try:
            for name in (None, *self._names):
                each = [line if name is None else line["interventions"][name] for line in lines]
                nats, details = (
                    torch.tensor([row for one in each for row in one[column]], dtype=torch.float64)
                    for column in ("nats", "details")
                )
                if not len(nats) == len(details) == self.done:
                    raise ValueError("a line has other windows")
                found.append(Sums(nats, tokens, text_bytes, details))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{self._file.path} is damaged; give --losses another file") from error
        return found

    def add(self, ways: Sequence[Sums]) -> None:
        """Takes the sums of the windows that come next, in each way, and writes the lines that are whole with them."""
        self._pending.append(list(ways))
        start = int(self._ends[self._written - 1]) if self._written else 0
        if start + sum(len(part[0]) for part in self._pending) < self._ends[self._written]:
            return
        rest = [Sums.join(parts) for parts in zip(*self._pending, strict=True)]
        while self._written < len(self._ends) and (size := int(self._ends[self._written]) - start) <= len(rest[0]):
            self._write([way.take(slice(size)) for way in rest], slice(start, start + size))
            rest = [way.take(slice(size, None)) for way in rest]
            start += size
        self._pending = [rest]

    def _write(self, ways: Sequence[Sums], windows: slice) -> None:
        whole = ways[0]
        line: dict[str, Any] = {"window" if self._tokenizer is None else "document": self._written}
        line |= {"tokens": int(whole.tokens.sum()), "text_bytes": int(whole.text_bytes.sum())}
        if self._tokenizer is not None:
            line["words"] = int(count_words(self._windows.take(windows), self._tokenizer)[0])
        line |= _figures(whole)
        if self._names:
            line["interventions"] = {name: _figures(way) for name, way in zip(self._names, ways[1:], strict=True)}
        self._file.write(line)
        self._written += 1


def _figures(sums: Sums) -> dict[str, Any]:
    nats, tokens = math.fsum(sums.nats.tolist()), int(sums.tokens.sum())
    return {
        "loss": nats / tokens,
        "bits_per_byte": bits_per_byte(nats, int(sums.text_bytes.sum())),
        "nats": sums.nats.tolist(),
        "details": sums.details.tolist(),
    }


def _words(value: Any) -> str:
    """A setting of an evaluation, for a sentence."""
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
