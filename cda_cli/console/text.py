"""Text of a model or of a person, which is never wrapped or changed, but for what could steer a terminal."""

from __future__ import annotations

import re

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from cda_cli.console.base import is_terminal

# All control characters but newline and tab, and the marks that turn the direction of writing.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def write_text(console: Console, text: str, style: str = "") -> None:
    """`text` on `console`, which writes to stdout: masked on a terminal (see `printable`), else exact.

    A character that the encoding of stdout lacks becomes an escape such as \\u3042.
    """
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    shown = printable(text) if is_terminal() else text
    shown = shown.encode(encoding, errors="backslashreplace").decode(encoding)
    # As a segment: a Text would turn tabs into spaces.
    console.print(Segments([Segment(shown, console.get_style(style))]), end="", soft_wrap=True)


def note(sentence: str) -> None:
    """A sentence on stderr."""
    Console(stderr=True).print(Text(sentence, style="yellow"), soft_wrap=True)


def printable(text: str) -> str:
    """`text` with U+FFFD for what could move the cursor, change the terminal or reorder a line; \\n and \\t stay."""
    return STEERING.sub("\N{REPLACEMENT CHARACTER}", text)
