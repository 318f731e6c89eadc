"""Reads prompts from arguments, from a file or from stdin, and plans the samples of each.

A file holds a prompt a line, or JSON lines: an object with a `prompt`, perhaps with a `seed` and settings of
`PromptSettings` for this prompt alone, and with any other fields, which its samples carry.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from cda_cli.data import without_surrogates
from cda_cli.errors import ConfigError, brief, requirement
from cda_cli.generation.requests import SamplingSettings
from cda_cli.plurals import counted

SEEDS = 2**63  # that a generator takes
STDIN = Path("-")
JSON_LINES = (".jsonl", ".ndjson")
# What the output says of each sample besides these settings.
WRITTEN = ("text", "finish_reason", "prompt_tokens", "completion_tokens", "truncated")


class PromptSettings(BaseModel):
    """How a prompt is sampled. `logprobs` is the number of likeliest tokens to tell beside each token, or None."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    num_samples: int = Field(1, ge=1)
    max_new_tokens: int = Field(256, ge=0)
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = Field(None, ge=1)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> PromptSettings:
        """Returns the settings with these names. Raises ConfigError for one of another kind or without meaning."""
        try:
            made = cls.model_validate(settings)
        except ValidationError as error:
            fault = error.errors()[0]
            raise ConfigError(
                f"{fault['loc'][0]} = {fault['input']!r} is not possible: {requirement(fault['msg'])}"
            ) from error
        made.check()
        return made

    def check(self) -> None:
        """Raises ConfigError for a setting without meaning."""
        self.sampling.check()
        if "" in self.stop:
            raise ConfigError("--stop is empty; give it at least one character")

    @property
    def sampling(self) -> SamplingSettings:
        return SamplingSettings(**{name: getattr(self, name) for name in SamplingSettings._fields})


class Prompt(NamedTuple):
    """A text to go on from. `fields` are those of its line that its samples carry."""

    text: str
    settings: PromptSettings
    seed: int | None = None
    fields: Mapping[str, Any] = {}


class Sample(NamedTuple):
    """A sample that is to be drawn: number `number` of prompt `place`, both counted from 1."""

    prompt: Prompt
    place: int
    number: int
    seed: int


def plan_samples(prompts: Sequence[Prompt], seed: int) -> list[Sample]:
    """Returns the samples of all prompts in order. Each takes the next seed, from `seed` or from its prompt's own on.

    Raises ConfigError for a seed that no generator takes.
    """
    if seed < 0:
        raise ConfigError(f"--seed must be 0 or more, not {seed}")
    samples: list[Sample] = []
    for place, prompt in enumerate(prompts, 1):
        first = seed + len(samples) if prompt.seed is None else prompt.seed
        count = prompt.settings.num_samples
        samples += [Sample(prompt, place, number + 1, first + number) for number in range(count)]
    largest = max(samples, key=lambda sample: sample.seed)
    if largest.seed >= SEEDS:
        given, count = (seed, len(samples)) if largest.prompt.seed is None else (largest.prompt.seed, largest.number)
        raise ConfigError(f"--seed {given} is too large for {counted(count, 'sample')}; give a smaller one")
    return samples


def read_prompts(given: Sequence[str], file: Path | None, stdin: TextIO, settings: PromptSettings) -> list[Prompt]:
    """Returns the prompts that were `given`, those of `file`, or all of `stdin` as one prompt.

    A file that is STDIN is read from `stdin`. `settings` are those of each prompt that sets nothing itself. Raises
    ConfigError, with the number of the line, for what is no prompt.
    """
    if given and file is not None:
        raise ConfigError("--prompt and --prompts exclude each other; give one of them")
    if given:
        return [Prompt(without_surrogates(text), settings) for text in given]
    if file is not None:
        return _prompts_of(file, stdin, settings)
    text = stdin.buffer.read().decode("utf-8-sig", errors="replace")
    if not text:
        raise ConfigError("stdin is empty; give --prompt TEXT, --prompts FILE, or text on stdin")
    return [Prompt(text, settings)]


def _prompts_of(file: Path, stdin: TextIO, settings: PromptSettings) -> list[Prompt]:
    """Reads a prompt from each line that is not empty.

    Only \\n or \\r\\n ends a line: a form feed, U+0085 or U+2028 belongs to its prompt. A name without an ending, such
    as that of a pipe, does not say whether the file holds JSON lines; a { at its beginning does.
    """
    name = "stdin" if file == STDIN else str(file)
    try:
        text = (stdin.buffer.read() if file == STDIN else file.read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} cannot be read ({brief(error)}); give UTF-8 text with a prompt a line") from error
    is_json = file.suffix.lower() in JSON_LINES or (not file.suffix and text.startswith("{"))
    lines = enumerate((line.removesuffix("\r") for line in text.split("\n")), 1)
    if is_json:
        prompts = [_prompt_of_json(line, f"{name}, line {number}", settings) for number, line in lines if line]
    else:
        prompts = [Prompt(line, settings) for _, line in lines if line]
    if not prompts:
        raise ConfigError(f"{name} holds no prompt; write one a line")
    return prompts


def _prompt_of_json(line: str, where: str, defaults: PromptSettings) -> Prompt:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON ({brief(error)}); write an object with a prompt on each line") from error
    text = document.pop("prompt", None) if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise ConfigError(f'{where} has no prompt; write an object such as {{"prompt": "Once upon", "seed": 1}}')
    seed = document.pop("seed", None)
    if seed is not None and not (type(seed) is int and 0 <= seed < SEEDS):
        raise ConfigError(f"{where}: seed = {seed!r} is not possible; give a whole number from 0 to 2^63 − 1")
    known = PromptSettings.model_fields
    own = {name: value for name, value in document.items() if name in known}
    carried = {name: value for name, value in document.items() if name not in known}
    for name in carried:
        _check_carried(name, where)
    try:
        settings = PromptSettings.of(defaults.model_dump() | own)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    return Prompt(without_surrogates(text), settings, seed, carried)


def _check_carried(name: str, where: str) -> None:
    """Refuses a field that the output has itself, and one that is nearly a setting, which would be carried unread."""
    if name in WRITTEN:
        raise ConfigError(f"{where}: {name!r} is a field of the output; give that field of the input another name")
    meant = difflib.get_close_matches(name.replace("-", "_").lower(), ["seed", *PromptSettings.model_fields], 1, 0.9)
    if meant:
        raise ConfigError(f"{where}: there is no setting {name!r}; did you mean {meant[0]!r}?")
