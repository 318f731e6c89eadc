"""Shows text as it is generated: the prompt dim, and what the model adds plain."""

from __future__ import annotations

from collections.abc import Iterable

from cda_cli.console.base import out
from cda_cli.console.text import write_text


class SampleDisplay:
    """Writes samples to stdout: piece by piece with `stream`, else each when it is whole; `quiet` only collects them.

    `headings` puts a line in front of each, as `head` does with several files. `end` follows each.
    """

    def __init__(self, stream: bool, quiet: bool, headings: bool = False, end: str = "\n") -> None:
        self._stream, self._quiet, self._headings, self._end = stream, quiet, headings, end
        self._console = out()
        self._is_first = True

    def begin(self, heading: str, prompt: str) -> None:
        if self._quiet:
            return
        if self._headings:
            write_text(self._console, f"{'' if self._is_first else self._end}==> {heading} <==\n", style="bold")
        self._is_first = False
        write_text(self._console, prompt, style="dim")

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
            write_text(self._console, self._end)
        return "".join(collected)
