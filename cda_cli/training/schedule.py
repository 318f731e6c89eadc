"""When something is due: by the step, or by the clock."""

from __future__ import annotations

import time


def due(step: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps is due after `step`. An interval of 0 means never."""
    return interval > 0 and step % interval == 0


class Timer:
    """Tells whether so many minutes have passed since the last restart; 0 minutes never pass."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._began = time.monotonic()

    def has_passed(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._began >= self._seconds

    def restart(self) -> None:
        self._began = time.monotonic()
