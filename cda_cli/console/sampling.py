"""Text as it comes: the prompt dim, what the model adds plain."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from cda_cli.console.base import out
from cda_cli.console.text import write_text


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
        write_text(self._console, text, style="dim")

    def follow(self, pieces: Iterable[str]) -> str:
        """Shows the pieces as they come, or all at the end; returns the text as it is."""
        collected: list[str] = []
        for piece in pieces:
            collected.append(piece)
            if self._stream and not self._quiet:
                write_text(self._console, piece)
        if not self._quiet:
            if not self._stream:
                write_text(self._console, "".join(collected))
            write_text(self._console, "\n")
        return "".join(collected)
