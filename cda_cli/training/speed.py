"""Tokens per second over a window, and the time that is left; pauses for validation and saving are not counted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

WINDOW = 20  # intervals between two lines of figures


class Speed:
    """`mark` after some steps; the first interval (compilation, warm-up) is forgotten once a second one is there."""

    def __init__(self) -> None:
        self._intervals: deque[tuple[int, int, float]] = deque(maxlen=WINDOW)
        self._last = time.perf_counter()
        self._warm = False

    def mark(self, steps: int, tokens: int) -> None:
        now = time.perf_counter()
        if not self._warm and len(self._intervals) == 1:
            self._intervals.clear()
            self._warm = True
        self._intervals.append((steps, tokens, now - self._last))
        self._last = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._last += time.perf_counter() - began

    @property
    def tokens_per_second(self) -> float:
        seconds = sum(interval[2] for interval in self._intervals)
        return sum(interval[1] for interval in self._intervals) / seconds if seconds else 0.0

    def seconds_left(self, steps: int) -> float | None:
        """Seconds for `steps` more, or None before anything was measured."""
        done = sum(interval[0] for interval in self._intervals)
        return steps * sum(interval[2] for interval in self._intervals) / done if done else None
