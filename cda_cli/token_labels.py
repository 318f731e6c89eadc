"""Tokens as labels: in one line, and with a mark for what cannot be seen."""

from __future__ import annotations

MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "": "¤"}


def visible(token: str) -> str:
    """The text of a token, with marks for spaces and for what cannot be printed."""
    return "".join(MARKS.get(c, c if c.isprintable() else "¤") for c in token) or "¤"
