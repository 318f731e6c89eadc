"""A curve in one line: its shape, its width, and what it does without blocks or without numbers."""

from __future__ import annotations

import io
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.console.sparkline import ASCII, BLOCKS, sparkline


def test_the_lowest_value_is_the_lowest_block() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == BLOCKS[::-1]


def test_more_values_than_characters_are_averaged() -> None:
    """Neighbours share a character: a single outlier among many moves it little, where a sample of them could miss it
    or show nothing else."""
    assert sparkline([8, 8, 6, 6, 4, 4, 1, 1], 4) == sparkline([8, 6, 4, 1], 4)
    assert sparkline([0.0] * 50 + [1.0] + [0.0] * 49 + [1.0] * 100, 2) == "▁█"


def test_fewer_values_than_characters_are_not_stretched() -> None:
    assert sparkline([1, 0], 20) == "█▁"


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    assert sparkline([2, math.nan, 1, math.inf], 4) == "█ ▁ "


@pytest.mark.parametrize(("values", "drawn"), [([], ""), ([3.5], "▁"), ([1, 1, 1], "▁▁▁"), ([math.nan], " ")])
def test_curves_without_a_slope(values: list[float], drawn: str) -> None:
    assert sparkline(values, 5) == drawn


def test_ascii_where_stdout_cannot_show_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1], 8) == ASCII[::-1]


def test_the_first_losses_do_not_flatten_the_rest() -> None:
    line = sparkline([100.0] * 5 + [6.0 - step / 20 for step in range(95)], 20)
    assert len(set(line[1:])) == len(BLOCKS), f"the losses after the first have no height: {line}"


@given(values=st.lists(st.floats()), width=st.integers(0, 40))
def test_any_values_give_at_most_width_characters(values: list[float], width: int) -> None:
    drawn = sparkline(values, width)
    assert len(drawn) == min(width, len(values))
    assert set(drawn) <= {*BLOCKS, *ASCII, " "}
