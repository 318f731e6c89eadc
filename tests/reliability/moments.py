"""Acts at an exact moment of a process: before or after any call that its main thread makes.

A moment has a number, so that a seed chooses it and a failure can be repeated. A clock could do neither.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Collection
from types import FrameType
from typing import Any

Counts = Callable[[FrameType, str, Any], bool]

# What changes a file, a folder, or what of them survives a power loss; safetensors writes a whole file in one call.
CHANGING = {
    "open",
    "write",
    "flush",
    "truncate",
    "fsync",
    "chmod",
    "mkdir",
    "rename",
    "replace",
    "unlink",
    "remove",
} | {
    "rmdir",
    "serialize_file",
}


class Moments:
    """Counts the moments for which `counts` holds, and calls `act` at number `at`.

    An exception that `act` raises comes out of the call that was about to be made, or had just been made.
    """

    def __init__(self, counts: Counts, at: int | None = None, act: Callable[[], None] | None = None) -> None:
        self.seen = 0
        self._counts, self._at, self._act = counts, at, act

    def __enter__(self) -> Moments:
        if isinstance(self._counts, Within):
            sys.settrace(self._wait)  # costs a fraction of a profiler, which hears of calls of C and of returns as well
        else:
            sys.setprofile(self._hook)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        sys.setprofile(None)

    def _wait(self, frame: FrameType, event: str, arg: Any) -> None:
        assert isinstance(self._counts, Within)
        if self._counts.begins(frame):
            sys.settrace(None)
            sys.setprofile(self._hook)

    def act_again(self, after: int, act: Callable[[], None]) -> None:
        """Acts once more, after so many moments, whether `counts` holds for them or not."""
        self._counts, self._at, self._act = every_call, self.seen + after, act

    def _hook(self, frame: FrameType, event: str, arg: Any) -> None:
        if frame.f_globals.get("__name__") == __name__ or not self._counts(frame, event, arg):
            return
        number, self.seen = self.seen, self.seen + 1
        if self._act is None or self._at is None:
            return
        # A phase can make a few calls fewer than the one whose moments were counted; its last one then stands for them.
        is_last = isinstance(self._counts, Within) and self._counts.over
        if number == self._at or (is_last and number < self._at):
            self._act()


def every_call(frame: FrameType, event: str, arg: Any) -> bool:
    """Counts the moments before and after every call, of Python or of C."""
    return True


def changing_calls(frame: FrameType, event: str, arg: Any) -> bool:
    """Counts the moments before and after every call that changes what is on the disk."""
    if event not in ("c_call", "c_return"):
        return False
    # A buffered file is written when it is closed, at the end of a `with`.
    closes_file = arg.__name__ == "__exit__" and isinstance(arg.__self__, io.BufferedWriter)
    # Of a list or a string a method of that name changes nothing on the disk.
    return closes_file or (arg.__name__ in CHANGING and not isinstance(arg.__self__, Collection))


class Within:
    """Counts every call from the `nth` time that a function of that name is entered until it returns."""

    def __init__(self, module: str, function: str, nth: int = 1) -> None:
        self._module, self._function, self._nth = module, function, nth
        self._frame: FrameType | None = None
        self.over = False

    def begins(self, frame: FrameType) -> bool:
        """Says whether that moment has come. Each call of a Python function asks until it has."""
        if frame.f_code.co_name != self._function or frame.f_globals.get("__name__") != self._module:
            return False
        self._nth -= 1
        if self._nth:
            return False
        self._frame = frame
        return True

    def __call__(self, frame: FrameType, event: str, arg: Any) -> bool:
        if self.over:
            return False
        self.over = event == "return" and frame is self._frame
        return True
