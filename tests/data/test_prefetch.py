"""Batches made ahead: the same ones in the same order, each with its own position."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from cda_cli.data import Prefetched, Tokens, TrainBatches
from cda_cli.errors import DataError


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_the_items_come_in_their_order(ahead: int) -> None:
    assert list(itertools.islice(Prefetched(itertools.count(), ahead), 50)) == list(range(50))
    assert list(Prefetched(iter("abc"), ahead)) == ["a", "b", "c"]


@pytest.mark.parametrize("ahead", [1, 3])
def test_they_are_made_before_they_are_asked_for(ahead: int) -> None:
    """So many and no more: each costs memory."""
    made: list[int] = []
    reached = threading.Event()

    def items() -> Iterator[int]:
        for number in itertools.count():
            made.append(number)
            if number == ahead:
                reached.set()
            yield number

    batches = Prefetched(items(), ahead)
    assert next(batches) == 0
    assert reached.wait(30), "nothing was made ahead"
    assert made == list(range(ahead + 1))


def test_an_error_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise DataError("gone")

    batches = Prefetched(items(), 2)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(DataError, match="gone"):
        next(batches)


def test_what_was_made_and_not_taken_is_not_behind_the_position() -> None:
    """A run that stops after batch n goes on with batch n + 1, however many were made by then."""
    ids = np.arange(301, dtype=np.uint16)
    tokens = Tokens(ids, np.ones_like(ids), text_bytes=301)
    expected = [batch.inputs for batch, _ in itertools.islice(TrainBatches(tokens, 4, 3, seed=5), 40)]
    found, position = [], None
    for length in (1, 7, 2, 30):
        batches = Prefetched(TrainBatches(tokens, 4, 3, seed=5, state=position), 4)
        taken = list(itertools.islice(batches, length))
        found += [batch.inputs for batch, _ in taken]
        position = taken[-1][1]
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
