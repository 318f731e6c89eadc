"""Batches that are made ahead, in a thread, while the ones before them are trained on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetched(Generic[T]):
    """The items of an endless iterator, up to `ahead` of them made before they are asked for.

    In their order, and an error comes where its item would have. An item that brings its own position (see `batches`)
    keeps it: what was made ahead and never taken counts for nothing. The iterator must draw no global random numbers.
    """

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._items, self._ahead = items, ahead
        # One thread, so that items are made one after another; it ends with this object.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._coming: deque[Future[T]] = deque()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        item = self._coming.popleft() if self._coming else self._ask()
        while len(self._coming) < self._ahead:
            self._coming.append(self._ask())
        return item.result()

    def _ask(self) -> Future[T]:
        return self._thread.submit(next, self._items)
