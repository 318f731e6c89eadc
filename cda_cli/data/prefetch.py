"""Makes batches ahead, in a thread, while the model trains on the ones before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetched(Generic[T]):
    """The items of an endless iterator in their order, up to `ahead` of them made before they are asked for.

    An error is raised in place of its item. An item that brings its own position (see `batches`) keeps it, so an item
    that was made ahead and never taken does not move the position. The iterator must draw no global random numbers.
    """

    def __init__(self, items: Iterator[T], ahead: int) -> None:
        self._items, self._ahead = items, ahead
        # A single thread makes one item after another. It ends with this object.
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
