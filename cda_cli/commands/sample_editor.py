"""The line editor of `cda sample RUN` on a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from cda_cli.console import (
    next_line,
    note,
    show_drawing,
    show_editor_help,
    show_growing,
    show_keys,
    show_last_lines,
    show_last_tokens,
    show_probabilities,
)
from cda_cli.errors import CdaError, UsageError, did_you_mean
from cda_cli.generation import SamplingSettings
from cda_cli.generation.draft import Draft
from cda_cli.generation.prompts import PromptSettings
from cda_cli.inspection.read_keys import keys_read
from cda_cli.restore import Restored
from cda_cli.signals import StopRequest

SETTINGS = (*SamplingSettings._fields, "max_new_tokens", "stop")
LAST_TOKENS, TOP_OF_EACH, TOP, TOP_KEYS = 8, 3, 12, 16


def edit(load: Callable[[], tuple[Restored, Any]], settings: PromptSettings, seed: int) -> None:
    """Takes lines from the terminal until it is left. `load` gives the model and the dtype of its matrix products."""
    with StopRequest() as stop, stop.at_once("interrupted"):
        draft = Draft(*load(), settings, seed)
    editor = SampleEditor(draft)
    note("Write a text to go on from, or /help.")
    while (line := next_line()) not in (None, "/quit"):
        try:
            editor.take(line)
        except CdaError as error:
            note(str(error))


class SampleEditor:
    """Does what lines say to a draft."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._commands: dict[str, Callable[[Sequence[str]], None]] = {
            "/undo": self._undo, "/retry": self._retry, "/top": self._top, "/keys": self._keys, "/set": self._set,
            "/help": lambda _: show_editor_help(),
        }  # fmt: skip

    def take(self, line: str) -> None:
        """Does what a line says. Raises CdaError where that is not possible."""
        if not line.startswith("/") or line.startswith("//"):
            if line:
                self._draft.write(line.removeprefix("/"))
            self._draw()
            return
        name, *words = line.split(maxsplit=2)
        if name not in self._commands:
            raise UsageError(f"unknown command {name}: {did_you_mean(name, self._commands)}")
        self._commands[name](words)

    def _draw(self) -> None:
        with StopRequest() as stop:
            show_growing(self._draft.text, self._draft.draw(stop))

    def _undo(self, _: Sequence[str]) -> None:
        self._draft.undo()
        show_last_lines(self._draft.text)

    def _retry(self, _: Sequence[str]) -> None:
        self._draft.undo_draw()
        self._draw()

    def _top(self, words: Sequence[str]) -> None:
        if words:
            [number] = _numbers("/top", words, most=1)
            show_probabilities(self._draft.probabilities(number, TOP))
        else:
            last = range(max(1, min(LAST_TOKENS, len(self._draft.tokens) - 1)), 0, -1)
            show_last_tokens([self._draft.probabilities(number, TOP_OF_EACH) for number in last])

    def _keys(self, words: Sequence[str]) -> None:
        number, *layers = _numbers("/keys", words, most=2) or [1]
        heads = keys_read(self._draft.restored.model, self._draft.before(number), self._draft.dtype, TOP_KEYS)
        shown = [head for head in heads if head.layer in (layers or [head.layer])]
        if not shown:
            raise UsageError(f"there is no layer {layers[0]}; give 0 to {heads[-1].layer}")
        show_keys(number, shown, self._draft.names(number))

    def _set(self, words: Sequence[str]) -> None:
        settings = self._draft.settings.model_dump(include=set(SETTINGS))
        if len(words) == 2:
            name, value = words
            if name not in settings:
                raise UsageError(f"unknown setting {name}: {did_you_mean(name, settings)}")
            self._draft.settings = PromptSettings.of(settings | {name: _value(value)})
        elif words:
            raise UsageError("/set takes a name and a value, such as /set temperature 0.5")
        show_drawing(self._draft.settings.model_dump(include=set(SETTINGS)))


def _numbers(command: str, words: Sequence[str], most: int) -> list[int]:
    numbers = [int(word) for word in words if word.isdecimal()]
    if len(numbers) < len(words) or len(numbers) > most:
        raise UsageError(f"{command} takes whole numbers, {most} at most; /help says which")
    return numbers


def _value(text: str) -> object:
    """Reads JSON, such as 0.5, null or "\\n", or else the text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text
