"""Ends a text before a stop string, which may begin in one token and end in a later one."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Takes a text in pieces and gives it on, but for the end that may still become a stop string.

    The text ends before the stop string that is whole first; of several that end at the same character, before the
    longest. How the text is cut into pieces makes no difference. An empty stop string is no stop string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = sorted(filter(None, strings), key=len, reverse=True)
        self._held = ""
        self.found: str | None = None

    def push(self, piece: str) -> str:
        """Returns the text that is now known to stay; nothing once a stop string was `found`."""
        if self.found is not None:
            return ""
        if not self._strings:
            return piece
        text = self._held + piece
        ends = [(text.find(string) + len(string), string) for string in self._strings if string in text]
        if ends:  # the longest string is the first of those that end at the same place
            end, self.found = min(ends, key=lambda each: each[0])
            self._held = ""
            return text[: end - len(self.found)]
        held = max(_overlap(text, string) for string in self._strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns the text that was held back, once no more comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, string: str) -> int:
    """Counts the characters at the end of `text` with which `string` begins, without the whole string."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
