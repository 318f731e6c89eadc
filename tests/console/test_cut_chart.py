"""The chart of the loss against the keys kept: each mark at its value, within the width, and none hidden."""

from __future__ import annotations

import math
import re
import sys
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.console.cut_chart import ASCII_MARKS, MARKS, cut_chart
from cda_cli.evaluation import Estimate

NAN = math.nan


def flat(value: float) -> Estimate:
    return Estimate(value, NAN, NAN, NAN)


def rows_of(drawn: str, mark: str) -> list[tuple[int, str]]:
    """The number and the label of each row that holds the mark, without the legend."""
    lines = drawn.splitlines()[:-2]
    return [(row, line[:6].strip()) for row, line in enumerate(lines) if mark in line]


def test_values_stand_at_their_figures_on_the_axis() -> None:
    """The axis is linear up to 0.01, and each power of ten is as far from the next beyond."""
    lines = {"top": {1: flat(1.0), 2: flat(0.1), 4: flat(0.01), 8: flat(0.0), 16: flat(-0.01)}}
    drawn = cut_chart(lines, 80).plain
    assert [label for _, label in rows_of(drawn, MARKS[0])] == ["+1", "+0.1", "+0.01", "0", "-0.01"]
    heights = [row for row, _ in rows_of(drawn, MARKS[0])]
    assert len({low - high for high, low in pairwise(heights)}) == 1
    keys = drawn.splitlines()[-2]
    for number, height in zip(lines["top"], heights, strict=True):
        column = drawn.splitlines()[height].index(MARKS[0])
        heading = re.search(rf"\b{number}\b", keys)
        assert heading
        assert abs(heading.start() - column) <= 2, "a mark does not stand above its number of keys"


def test_equal_values_are_seen_side_by_side() -> None:
    drawn = cut_chart({"top": {1: flat(0.1)}, "recent": {1: flat(0.1)}, "random": {1: flat(0.1)}}, 80).plain
    assert "".join(MARKS[:3]) in drawn
    assert drawn.splitlines()[-1].split() == [MARKS[0], "top", MARKS[1], "recent", MARKS[2], "random"]


def test_an_interval_is_a_bar() -> None:
    drawn = cut_chart({"top": {1: Estimate(0.1, 0.2, 0.01, 1.0)}}, 80).plain
    bars = rows_of(drawn, "│")
    assert (bars[0][1], bars[-1][1]) == ("+1", "+0.01")
    assert len(bars) + 1 == bars[-1][0] - bars[0][0] + 1, "the mark interrupts the bar, and nothing else does"


@given(
    values=st.lists(st.floats(-20, 20), min_size=1, max_size=9),
    choices=st.integers(1, 6),
    width=st.sampled_from([80, 100]),
)
def test_every_line_fits_and_every_mark_is_there(values: list[float], choices: int, width: int) -> None:
    lines = {f"choice {one}": {2**place: flat(value) for place, value in enumerate(values)} for one in range(choices)}
    drawn = cut_chart(lines, width).plain
    *chart, _, _ = drawn.splitlines()
    assert max(map(len, chart)) <= width
    for mark in MARKS[:choices]:
        assert "".join(chart).count(mark) == len(values)


def test_a_terminal_without_these_marks_gets_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        encoding = "ascii"

    monkeypatch.setattr(sys, "stdout", Plain())
    drawn = cut_chart({"top": {1: Estimate(0.1, 0.1, 0.05, 0.2)}, "random": {1: flat(1.0)}}, 80).plain
    assert drawn.isascii()
    assert drawn.splitlines()[-1].split() == [ASCII_MARKS[0], "top", ASCII_MARKS[1], "random"]
