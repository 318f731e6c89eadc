"""A screen: stdout that is a terminal, or is not, and keeps what is written to it."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest


class Screen(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


MakeScreen = Callable[..., Screen]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> MakeScreen:
    """`screen(terminal=True, width=80)` puts a screen in the place of stdout."""

    def make(terminal: bool = False, width: int = 80) -> Screen:
        made = Screen(terminal)
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "LINES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("TERM", "xterm-256color")
        if terminal:
            monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys, "stdout", made)
        return made

    return make
