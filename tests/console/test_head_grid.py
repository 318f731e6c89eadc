"""The map of all heads by one measure: each figure in its place, within the width."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from cda_cli.console.head_grid import CIVIDIS, head_grid, short


def grid(figures: list[list[float]], width: int = 80, is_coloured: bool = False) -> Text:
    return head_grid(range(len(figures)), range(len(figures[0])), figures, width, is_coloured)


def lines(figures: list[list[float]], width: int = 80) -> list[str]:
    """As they come out on a screen of that width."""
    file = io.StringIO()
    Console(file=file, width=width).print(grid(figures, width))
    return file.getvalue().split("\n")[:-1]


def test_figures_and_shades_are_in_their_places() -> None:
    heading, first, second, legend = lines([[0.0, 2.5, math.nan], [5.0, 7.5, 10.0]])
    assert heading.split() == ["layer", "0", "1", "2"]
    assert first.split() == ["0", "0.00·", "2.50░", "––"]
    assert second.split() == ["1", "5.00▒", "7.50▓", "10.0█"]
    assert heading.index("1") == first.index("2.50") + 3, "a heading stands above the end of its number"
    expected = [
        word for shade, low in zip("·░▒▓█", range(0, 10, 2), strict=True) for word in (shade, "from", f"{low}.00")
    ]
    assert legend.split() == [*expected, "to", "10.0"]


def test_equal_figures_have_one_shade() -> None:
    assert lines([[3.0, 3.0]])[1].split() == ["0", "3.00·", "3.00·"]


@given(layers=st.integers(1, 4), heads=st.integers(1, 70))
def test_every_line_fits(layers: int, heads: int) -> None:
    """With numbers up to 12 heads, and with shades alone beyond."""
    drawn = lines([[float(head) for head in range(heads)] for _ in range(layers)])
    assert len(drawn) == layers + 2
    assert max(map(len, drawn)) <= 80
    assert ("." in drawn[1]) == (heads <= 12)


def test_colours_stand_behind_the_figures() -> None:
    """The lowest figure has the first colour of the scale, the highest the last, and the middle the one between."""
    drawn = grid([[1.0, 3.0], [5.0, math.nan]], is_coloured=True)
    found = {drawn.plain[span.start : span.end].strip(): str(span.style) for span in drawn.spans}
    assert found["1.00"] == f"white on {CIVIDIS[0]}"
    assert found["3.00"] == f"white on {CIVIDIS[4]}"
    assert found["5.00"] == f"black on {CIVIDIS[-1]}"
    assert drawn.plain.splitlines()[2].split() == ["1", "5.00", "–"]
    assert drawn.plain.splitlines()[-1].split() == ["1.00", "5.00"], "the scale names its ends"


@given(layers=st.integers(1, 4), heads=st.integers(1, 70))
def test_coloured_cells_stand_where_shades_do(layers: int, heads: int) -> None:
    figures = [[float(head) for head in range(heads)] for _ in range(layers)]
    plain, coloured = grid(figures).plain.splitlines(), grid(figures, is_coloured=True).plain.splitlines()
    assert coloured[0] == plain[0]
    assert {len(line) for line in coloured[1:-1]} == {len(line) for line in plain[1:-1]}
    assert max(map(len, coloured)) <= 80


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0.00"),
        (0.125, "0.12"),
        (9.94, "9.94"),
        (9.96, "10.0"),
        (99.6, "100"),
        (999, "999"),
        (1234, "1.2k"),
        (45_678, "46k"),
        (2.5e6, "2.5M"),
        (-1.5, "-1.50"),
        (math.nan, "–"),
        (math.inf, "–"),
    ],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert short(number) == text
