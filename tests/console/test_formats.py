"""Numbers as people read them, tables that keep what they are given, JSON that every reader takes."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.console import print_json
from cda_cli.console.base import count, duration, memory, out, plus_minus, print_pairs, share
from cda_cli.plurals import counted
from tests.console.conftest import MakeScreen


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (1234567, "1.23 M"), (999.7, "1 k"), (999_999, "1 M"), (2.5e12, "2.5 T")],
)
def test_counts(number: float, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (2**29, "512 MiB"), (2**30, "1 GiB"),
        (1001 * 2**20, "1001 MiB"), (999.7 * 2**20, "1000 MiB"), (1.5 * 2**40, "1536 GiB"),
    ],
)  # fmt: skip
def test_memory(size: float, text: str) -> None:
    assert memory(size) == text


@given(st.floats(1, 9e14))
def test_no_count_and_no_memory_is_in_powers_of_ten(number: float) -> None:
    """1e+03 M is nothing that a person reads. Three digits, and right to half of the last."""
    units = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    matched = re.fullmatch(r"([0-9.]+) ?([kMGT]?)", count(number))
    assert matched, count(number)
    assert float(matched[1]) * units[matched[2]] == pytest.approx(number, rel=0.00501)
    sizes = {"B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
    matched = re.fullmatch(r"([0-9.]+) ([KMG]?i?B)", memory(number))
    assert matched, memory(number)
    assert float(matched[1]) * sizes[matched[2]] == pytest.approx(number, rel=0.00501, abs=0.501)


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "–"), (0, "0:00"), (59.6, "1:00"), (3599.6, "1:00:00"), (3725, "1:02:05")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_an_error_that_is_not_known_is_left_out() -> None:
    assert plus_minus(1.25, 0.5, 2) == "1.25 ± 0.50"
    assert plus_minus(1.25, math.nan, 2) == "1.25"
    assert share(0.125) == "12.5%"


def test_values_are_no_markup(screen: MakeScreen) -> None:
    """A path with brackets or colons is shown as it is, not as a colour or a face."""
    shown = screen()
    value = "/a/[bold]b[/x]/:smile:/[red]"
    print_pairs(out(), {"path": value})
    assert value in shown.getvalue()


def test_off_a_terminal_nothing_is_coloured_or_cut(screen: MakeScreen) -> None:
    """A value stays on its line, however long, so that a pipe gets a path as it is."""
    shown = screen()
    print_pairs(out(), {"path": "/x y" * 300})
    assert shown.getvalue() == f"path  {'/x y' * 300}\n"


def test_json_is_one_document(screen: MakeScreen) -> None:
    """Text stays readable; a number that is none is null, however deep."""
    shown = screen()
    print_json({"λ": [1.5, math.nan, {"deep": (math.inf, "\N{ESCAPE}[2J")}]})
    assert json.loads(shown.getvalue()) == {"λ": [1.5, None, {"deep": [None, "\N{ESCAPE}[2J"]}]}
    assert "λ" in shown.getvalue()
    assert "\N{ESCAPE}" not in shown.getvalue()


@pytest.mark.parametrize(("number", "words"), [(0, "0 steps"), (1, "1 step"), (2, "2 steps"), (1234, "1,234 steps")])
def test_a_number_agrees_with_its_noun(number: int, words: str) -> None:
    assert counted(number, "step") == words
    assert counted(number, "batch", "batches") == words.replace("steps", "batches").replace("step", "batch")
