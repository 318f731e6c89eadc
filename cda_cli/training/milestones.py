"""When to save by the clock, and when to stop because the validation loss no longer falls."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable


def due(step: int, interval: int) -> bool:
    """Whether something is due after `step` that is done every `interval` steps; 0: never."""
    return interval > 0 and step % interval == 0


class Minutes:
    """Whether so many minutes have passed since the last restart; 0: they never have."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._began = time.monotonic()

    def passed(self) -> bool:
        return self._seconds > 0 and time.monotonic() - self._began >= self._seconds

    def restart(self) -> None:
        self._began = time.monotonic()


class Patience:
    """Validations in a row without a new lowest loss; `over` once there were `limit` of them (0: never).

    `losses` are those that the run has behind it, oldest first, so that a resumed run has as little patience left as
    the one before. A loss that is not finite is never the lowest.
    """

    def __init__(self, limit: int, losses: Iterable[float | None] = ()) -> None:
        self._limit = limit
        self._lowest = math.inf
        self._in_vain = 0
        for loss in losses:
            self.add(loss)

    def add(self, loss: float | None) -> None:
        if loss is not None and loss < self._lowest:
            self._lowest, self._in_vain = loss, 0
        else:
            self._in_vain += 1

    @property
    def over(self) -> bool:
        return 0 < self._limit <= self._in_vain

    def words(self) -> str:
        return f"{self._in_vain} validations in a row brought no loss below {self._lowest:.4f}"
