"""Text as it comes: the prompt dim, what the model adds plain. The text itself is never wrapped or changed."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.segment import Segment, Segments
from rich.text import Text

from cda_cli.console.base import out
from cda_cli.console.training import printable


class SampleDisplay:
    """`stream`: piece by piece; `quiet`: show nothing, only collect; `several`: say which sample is which."""

    def __init__(self, stream: bool, quiet: bool, several: bool) -> None:
        self._stream, self._quiet, self._several = stream, quiet, several
        self._console = out()

    def begin(self, prompt: int, number: int, text: str) -> None:
        if self._quiet:
            return
        if self._several:
            # On stderr, so that a pipe gets the text alone.
            Console(stderr=True).print(Text(f"── prompt {prompt + 1}, sample {number + 1}", style="dim"))
        self._write(text, style="dim")

    def follow(self, pieces: Iterable[str]) -> str:
        """Shows the pieces as they come, or all at the end; returns the text as it is."""
        collected: list[str] = []
        for piece in pieces:
            collected.append(piece)
            if self._stream and not self._quiet:
                self._write(piece)
        if not self._quiet:
            if not self._stream:
                self._write("".join(collected))
            self._write("\n")
        return "".join(collected)

    def _write(self, text: str, style: str = "") -> None:
        # As segments: a Text would turn tabs into spaces.
        segment = Segment(printable(text), self._console.get_style(style))
        self._console.print(Segments([segment]), end="", soft_wrap=True)
        sys.stdout.flush()
