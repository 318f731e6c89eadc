"""The picture of a head's weights: each shade in its place, within the width."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from cda_cli.console.heat_map import heat_map

START = 9  # of the first cell: a label of 8, and a space


def lines(weights: list[list[float]], tokens: list[str], width: int = 100) -> list[str]:
    """As they come out on a screen of that width."""
    file = io.StringIO()
    Console(file=file, width=width).print(heat_map(weights, tokens, width))
    return file.getvalue().split("\n")[:-1]


def square(size: int, weight: float = 0.5, null: int = 0) -> list[list[float]]:
    return [[weight] * (size + null) for _ in range(size)]


@pytest.mark.parametrize(
    ("weight", "shade"),
    [(0, " "), (1e-3, " "), (2e-3, "·"), (0.19, "·"), (0.21, "░"), (0.41, "▒"), (0.61, "▓"), (0.81, "█"), (1, "█")],
)
def test_shades(weight: float, shade: str) -> None:
    """They also read without colour: the darker, the more."""
    picture = lines([[weight]], ["a"])
    assert picture[1][START:] == shade * 2


def test_each_weight_is_in_its_place() -> None:
    """The rows are queries, the columns keys; what a query cannot see is blank."""
    picture = lines([[1.0, 0.9, 0.9], [0.0, 0.5, 0.9], [0.3, 0.0, 0.7]], ["a", "b", "c"])
    assert picture[0].rstrip() == " " * START + "a b c"
    assert [row.rstrip() for row in picture[1:4]] == ["       a ██", "       b   ▒▒", "       c ░░  ▓▓"]


def test_null_keys_come_first() -> None:
    """Every query sees them."""
    picture = lines(square(3, null=2), ["a", "b", "c"])
    assert picture[0].split() == ["∅", "∅", "a", "b", "c"]
    assert [len(row.rstrip()) - START for row in picture[1:4]] == [6, 8, 10]


def test_the_legend_names_every_shade() -> None:
    legend = lines(square(2), ["a", "b"])[-1]
    for shade, words in (("·", "to 0.2"), ("░", "to 0.4"), ("▒", "to 0.6"), ("▓", "to 0.8"), ("█", "to 1")):
        assert f"{shade * 2} {words}" in legend


@given(width=st.integers(30, 200), size=st.integers(4, 70), null=st.integers(0, 3))
def test_every_line_fits_the_width(width: int, size: int, null: int) -> None:
    """A row that wraps breaks the picture; the legend below it may go on in the next line."""
    picture = lines(square(size, null=null), ["tok"] * size, width)
    assert max(map(cell_len, picture)) <= width
    rows = [line for line in picture if line.startswith("     tok ")]
    assert 4 <= len(rows) <= min(size, 48)
    assert len(rows) == next(index for index, line in enumerate(picture) if "λ:" in line) - 1
    assert [len(row.rstrip()) for row in rows] == [START + 2 * (query + 1 + null) for query in range(len(rows))]


@pytest.mark.parametrize("token", ["", " ", "\n", "\t", "\N{ESCAPE}[2J", "\r", "\u202e", "a\nb", "[bold]", ":smile:"])
def test_no_token_breaks_the_picture(token: str) -> None:
    """Line ends, spaces and what is not printable become marks."""
    picture = lines(square(2), [token, "x"])
    assert len(picture) == 4
    assert picture[1][START:].rstrip() == "▒▒"
    assert "\N{ESCAPE}" not in "".join(picture)
    assert picture[1][:8].strip(), "a token without a label looks as if a row were missing"


@pytest.mark.parametrize("token", ["日本語", "🙂", "e\N{COMBINING ACUTE ACCENT}", "한국어의글자들여덟"])
def test_wide_tokens_keep_the_columns(token: str) -> None:
    """A character of two cells, or of none, moves the cells behind it, and the columns no longer stand for keys."""
    picture = lines(square(2), [token, "x"])
    assert cell_len(picture[0].rstrip()) == START + 3, "the heading of the second key is not above its cells"
    for row, cells in ((picture[1], "▒▒"), (picture[2], "▒▒▒▒")):
        assert cell_len(row[: row.index("▒")]) == START
        assert row.rstrip().endswith(cells)
