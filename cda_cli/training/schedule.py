"""When something is due: by the step, or by the clock."""

from __future__ import annotations

import math
import time


def due(step: int, interval: int) -> bool:
    """Whether something that is done every `interval` steps is due after `step`. An interval of 0 means never."""
    return interval > 0 and step % interval == 0


def is_one_of(step: int, share: float) -> bool:
    """Whether the step with index `step`, counted from 0, is one of a share of all steps, which lie evenly.

    Of a share of 0.5 that is every second step. It follows from the step alone, so a resumed run has the same steps.
    """
    return math.floor((step + 1) * share) > math.floor(step * share)


class Timer:
    """Tells whether so many minutes have passed since the last restart; 0 minutes never pass."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._began = time.monotonic()

    def has_passed(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._began >= self._seconds

    def restart(self) -> None:
        self._began = time.monotonic()
