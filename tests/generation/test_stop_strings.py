"""A text ends before its stop string, wherever the pieces of it are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cda_cli.data import ByteTokenizer
from cda_cli.generation.stop_strings import StopStrings

TEXTS = st.text("abé", max_size=20)
STRINGS = st.lists(st.text("abé", min_size=1, max_size=4), max_size=4)


def by_characters(text: str, strings: list[str]) -> tuple[str, str | None]:
    """Reads one character after another, and ends with the longest stop string that has just become whole."""
    for end in range(1, len(text) + 1):
        whole = [string for string in strings if text[:end].endswith(string)]
        if whole:
            found = max(whole, key=len)
            return text[: end - len(found)], found
    return text, None


def pushed(pieces: list[str], strings: list[str]) -> tuple[list[str], str | None]:
    stop = StopStrings(strings)
    given = [stop.push(piece) for piece in pieces]
    return [*given, stop.flush()], stop.found


@given(TEXTS, STRINGS, st.sets(st.integers(0, 20)))
@example("aab", ["ab", "aab"], {2})
@example("aaab", ["aab"], {1, 2, 3})
@example("abab", ["bb", "aba"], set())
def test_the_pieces_make_no_difference(text: str, strings: list[str], cuts: set[int]) -> None:
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(places)]
    given, found = pushed(pieces, strings)
    assert ("".join(given), found) == by_characters(text, strings)


@given(TEXTS, STRINGS)
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, strings: list[str]) -> None:
    """Text that is shown as it comes must neither lag nor be taken back."""
    stop, shown = StopStrings(strings), ""
    for end, character in enumerate(text, 1):
        shown += stop.push(character)
        if stop.found:
            break
        held = text[len(shown) : end]
        assert shown + held == text[:end]
        starts = [string[:n] for string in strings for n in range(1, len(string))]
        assert held in ["", *starts], f"{held!r} begins no stop string"
        longest = max((start for start in starts if text[:end].endswith(start)), key=len, default="")
        assert held == longest


def test_a_stop_string_crosses_the_bytes_of_its_characters() -> None:
    """A byte tokenizer spreads é over two tokens, and the decoder keeps the first until the second has come."""
    tokenizer, stop, shown = ByteTokenizer(), StopStrings(["é\n"]), []
    decoder = tokenizer.stream()
    for token in tokenizer.encode("caféé\nmore"):
        shown.append(stop.push(decoder.push(int(token))))
    assert "".join(shown) == "café"
    assert stop.found == "é\n"


@pytest.mark.parametrize("strings", [[], [""]])
def test_without_stop_strings_nothing_is_held(strings: list[str]) -> None:
    assert pushed(["ab", "c"], strings) == (["ab", "c", ""], None)
