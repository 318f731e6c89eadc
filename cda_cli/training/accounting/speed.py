"""Tokens per second over a window, the share of it spent waiting for data, and the time that is left.

Validation and saving do not count.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

WINDOW = 20  # intervals, each from one log line to the next
HALF_LIFE = 10.0  # seconds after which a step counts half as much for the time that is left


class Interval(NamedTuple):
    """Some steps: their number, tokens and seconds, and the seconds in which they waited for a batch."""

    steps: int
    tokens: int
    seconds: float
    waited: float


class Speed:
    """Measures intervals: call `add` after each step, and `mark` before each log line.

    The first step of a process compiles and warms up. It is an interval of its own, which is forgotten once there is
    another. The first log line, also after a resume, thus has the speed of the steps to come.

    The time that is left follows the last steps, by an exponential mean: the intervals may be minutes long.
    """

    def __init__(self) -> None:
        self._intervals: deque[Interval] = deque(maxlen=WINDOW)
        self._last = self._last_step = time.perf_counter()
        self._steps = self._tokens = 0
        self._waited = 0.0
        self._marks = 0
        self._recent_steps = self._recent_seconds = 0.0  # both weighted

    def add(self, tokens: int) -> None:
        """Counts a step of so many tokens."""
        now = time.perf_counter()
        seconds, self._last_step = now - self._last_step, now
        if self._marks == 1 and not self._steps:  # this is the second step
            self._recent_steps = self._recent_seconds = 0.0
        keep = max(0.5, 0.5 ** (seconds / HALF_LIFE))  # a long step has at most half of the weight
        self._recent_steps = keep * self._recent_steps + 1
        self._recent_seconds = keep * self._recent_seconds + seconds
        self._steps += 1
        self._tokens += tokens
        if not self._marks:
            self.mark()

    def mark(self) -> None:
        """Ends the interval, if it has a step."""
        if not self._steps:
            return
        now = time.perf_counter()
        if self._marks == 1:
            self._intervals.clear()
        self._intervals.append(Interval(self._steps, self._tokens, now - self._last, self._waited))
        self._last, self._steps, self._tokens, self._waited = now, 0, 0, 0.0
        self._marks += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        pause = time.perf_counter() - began
        self._last += pause
        self._last_step += pause

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @property
    def tokens_per_second(self) -> float:
        seconds = self._sum("seconds")
        return self._sum("tokens") / seconds if seconds else 0.0

    @property
    def data_wait(self) -> float:
        """The share of the time that the loop waited for data."""
        seconds = self._sum("seconds")
        return self._sum("waited") / seconds if seconds else 0.0

    def seconds_left(self, steps: int) -> float | None:
        """Estimates the seconds that `steps` more steps take at the pace of the last ones; None before the first."""
        return steps * self._recent_seconds / self._recent_steps if self._recent_steps else None

    def _sum(self, name: str) -> float:
        return sum(getattr(interval, name) for interval in self._intervals)
