"""A request to stop, by a signal or because stdout is lost. Long work polls it, finishes what it must, and saves."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TypeVar

from cda_cli.errors import InterruptedRunError

T = TypeVar("T")


class StopRequest:
    """While entered, SIGINT, SIGTERM and SIGHUP set `signal_number` and do nothing else; a second one changes nothing.

    A SIGHUP that is ignored at the start (nohup) stays ignored.

    Inside `at_once` they end the block; leaving the request then raises InterruptedRunError. Elsewhere the first one
    calls `answer`, which runs within the signal handler: it must neither wait nor use a buffered stream.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.reason = ""
        self.answer: Callable[[], object] = lambda: None
        self._at_once, self._ended = False, "interrupted"
        self._before: dict[int, signal.Handlers] = {}

    def __bool__(self) -> bool:
        return self.signal_number is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._before[number] = signal.signal(number, self._receive)  # type: ignore[assignment]
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            self.check(self._ended)

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        """Within it, a request ends the work at once, by KeyboardInterrupt, so that its clean-up still runs.

        It is for work that has nothing to save and cannot poll (a download, reading a large file). `message` is that
        of the InterruptedRunError.
        """
        self.check(message)
        self._ended, self._at_once = message, True
        try:
            yield
        finally:
            self._at_once = False
        self.check(message)

    def check(self, message: str = "interrupted") -> None:
        """Raises InterruptedRunError once a stop was asked for."""
        if self.signal_number is not None:
            raise InterruptedRunError(self.reason + message, self.signal_number)

    def lose(self, error: OSError) -> None:
        """Asks to stop as SIGPIPE would, since `error` has shown that stdout can no longer be written."""
        if self.signal_number is None:
            self.signal_number = signal.SIGPIPE
            self.reason = f"stdout can no longer be written ({error.strerror}); "

    def agree(self) -> None:
        """Makes a request to any of several processes known to all; each calls this at the same places."""

    def until(self, items: Iterable[T]) -> Iterator[T]:
        """Yields `items` until a stop is asked for; it always yields the first."""
        for item in items:
            yield item
            self.agree()
            if self:
                return

    def _receive(self, number: int, frame: FrameType | None) -> None:
        is_first = self.signal_number is None
        self.signal_number = self.signal_number or number
        if self._at_once:
            raise KeyboardInterrupt
        if is_first:
            self.answer()
