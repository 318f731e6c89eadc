"""Guards stdin, stdout and stderr, which may be closed or full, or may go away while a command runs."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TextIO

from cda_cli.errors import OutputLostError


class _Stderr(io.FileIO):
    """Calls `lost` at the first write that fails, and drops what is written from then on.

    Neither another thread nor the end of the interpreter thus meets the error again.
    """

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._is_lost = False

    def write(self, data: Any) -> int:
        while not self._is_lost:
            try:
                written: int | None = super().write(data)
            except OSError as error:
                self._is_lost = True
                self.lost(error)
            else:
                if written is not None:
                    return written
                select.select([], [self], [])  # a pipe that another process has made non-blocking is full
        return len(data)

    def lost(self, error: OSError) -> None:
        """Ignores the error, since there is no place left to report it."""


def _refuse(error: OSError) -> None:
    raise OutputLostError(error) from error


class _Stdout(_Stderr):
    answer: ClassVar[Callable[[OSError], None]] = staticmethod(_refuse)

    def lost(self, error: OSError) -> None:
        type(self).answer(error)


@contextmanager
def when_stdout_is_lost(answer: Callable[[OSError], None]) -> Iterator[None]:
    """Within it, the first write to stdout that fails calls `answer`, and raises no OutputLostError."""
    _Stdout.answer = staticmethod(answer)
    try:
        yield
    finally:
        _Stdout.answer = staticmethod(_refuse)


def open_streams() -> None:
    """Opens the null device in place of each closed stream, and guards stdout and stderr if they are open.

    A closed stdin then is empty, and what goes to a closed stdout or stderr is dropped. Otherwise a file that is opened
    later would get the number of the closed stream, and all that is written to that stream.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = _guarded(sys.stdout, sys.__stdout__, _Stdout(1))
    sys.stderr = _guarded(sys.stderr, sys.__stderr__, _Stderr(2))


def _guarded(stream: TextIO | None, original: TextIO | None, raw: _Stderr) -> TextIO:
    """Returns a guarded stream in place of the one that the process was started with; any other stream stays.

    A character that the encoding lacks is written as a question mark, and a newline is always \\n.
    """
    if stream is not None and stream is not original:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace", newline="\n")
        return stream
    buffer = io.BufferedWriter(raw)
    if not isinstance(stream, io.TextIOWrapper):
        return io.TextIOWrapper(buffer, "utf-8", "replace", "\n")
    return io.TextIOWrapper(
        buffer,
        stream.encoding,
        "replace",
        "\n",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
