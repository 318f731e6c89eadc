"""Sentences, and text of a model or of a person. Such text is never wrapped, and only changed where it could steer a
terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.segment import Segment, Segments
from rich.text import Text

from cda_cli.console.base import is_terminal, out, print_trimmed

# All control characters but newline and tab, and the marks that change the direction of writing.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def write_text(console: Console, text: str, style: str = "") -> None:
    """Writes `text` to `console`, which is stdout: masked on a terminal (see `printable`), and exact elsewhere.

    A character that the encoding of stdout lacks becomes an escape such as \\u3042.
    """
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    shown = printable(text) if is_terminal() else text
    shown = shown.encode(encoding, errors="backslashreplace").decode(encoding)
    # A Text would turn tabs into spaces.
    console.print(Segments([Segment(shown, console.get_style(style))]), end="", soft_wrap=True)


def note(sentence: str) -> None:
    """Prints a sentence on stderr."""
    print_sentence(Console(stderr=True), sentence, style="yellow")


def print_sentence(console: Console, words: str | Text, style: str = "") -> None:
    """Prints `words` as one line, which can be searched for; on a terminal it is wrapped between words.

    A word that is longer than a line, such as a path, stays whole, so that it can be copied.
    """
    text = words if isinstance(words, Text) else Text(words, style=style)
    if console.file.isatty():
        text = wrapped(text, console.width)
    console.print(text, soft_wrap=True)


def print_next(console: Console, commands: Sequence[str]) -> None:
    """Prints the commands that one would run next."""
    console.print()
    print_sentence(console, "Next:", style="bold")
    for command in commands:
        print_sentence(console, f"  {command}")


def wrapped(text: Text, width: int) -> Text:
    """`text` with newlines between its words, so that only a word that is longer than `width` makes a longer line."""
    breaks: list[int] = []
    for word in re.finditer(r"\S+", text.plain):
        start = cell_len(text.plain[breaks[-1] if breaks else 0 : word.start()])
        if start and start + cell_len(word.group()) > width:
            breaks.append(word.start())
    lines = text.divide(breaks)
    for line in lines[:-1]:
        line.rstrip()
    return Text("\n").join(lines)


def printable(text: str) -> str:
    """`text` with U+FFFD for what could move the cursor, change the terminal or reorder a line; \\n and \\t stay."""
    return STEERING.sub("\N{REPLACEMENT CHARACTER}", text)


def section(title: str, content: RenderableType) -> None:
    """Prints a heading on stdout, and what stands below it."""
    console = out()
    heading(console, title)
    print_trimmed(console, content)


def heading(console: Console, title: str) -> None:
    console.print()
    print_sentence(console, title, style="bold")
