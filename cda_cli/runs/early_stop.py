"""Stops a run early, once its validation loss no longer falls."""

from __future__ import annotations

import math
from collections.abc import Iterable

from cda_cli.plurals import counted


class Patience:
    """Counts validations in a row without a new lowest loss. It is `over` after `limit` of them, or never if that is 0.

    `losses` are those of the run so far, oldest first, so that a resumed run has as much patience left as it had
    before. A loss that is not finite is never the lowest.
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
        return f"{counted(self._in_vain, 'validation')} in a row brought no loss below {self._lowest:.4f}"
