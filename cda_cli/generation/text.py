"""Generates text for a prompt: prompt text → tokens → pieces of text, each as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch

from cda_cli.data import StreamDecoder, without_surrogates
from cda_cli.errors import ConfigError, brief
from cda_cli.generation.generate import generate
from cda_cli.generation.requests import SamplingSettings
from cda_cli.restore import Restored
from cda_cli.signals import StopRequest


def read_prompts(prompts: Sequence[str], prompts_file: Path | None, stdin: TextIO) -> list[str]:
    """Returns the prompts: `prompts`, each line of `prompts_file`, or all of `stdin` as one. Raises ConfigError."""
    if prompts and prompts_file is not None:
        raise ConfigError("--prompt and --prompts-file exclude each other; give one of them")
    if prompts:
        return [without_surrogates(prompt) for prompt in prompts]
    if prompts_file is not None:
        return _prompts_of_lines(prompts_file)
    if stdin.isatty():
        raise ConfigError("there is no prompt; give --prompt TEXT, --prompts-file FILE, or text on stdin")
    text = stdin.buffer.read().decode("utf-8-sig", errors="replace")
    if not text:
        raise ConfigError("stdin is empty; give --prompt TEXT, --prompts-file FILE, or text on stdin")
    return [text]


def _prompts_of_lines(file: Path) -> list[str]:
    """Reads a prompt a line. Only \\n or \\r\\n ends a line: a form feed, U+0085 or U+2028 belongs to its prompt."""
    try:
        lines = file.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({brief(error)}); give --prompts-file UTF-8 text with a prompt a line"
        ) from error
    prompts = [prompt for line in lines if (prompt := line.removesuffix("\r"))]
    if not prompts:
        raise ConfigError(f"{file} holds no prompt; write one a line")
    return prompts


def generate_text(
    restored: Restored,
    prompt: str,
    max_new_tokens: int,
    settings: SamplingSettings,
    *,
    seed: int,
    dtype: torch.dtype,
    stop: StopRequest,
) -> Iterator[str]:
    """Yields the text that follows `prompt`, in pieces that never end within a character, until a stop is asked for.

    Raises ConfigError, at once, if the prompt is empty or does not fit the context.
    """
    tokenizer = restored.tokenizer
    prompt_tokens = [*map(int, tokenizer.beginning.ids), *map(int, tokenizer.encode(prompt))]
    separator = restored.tokenizer.separator
    tokens = generate(
        restored.model, prompt_tokens, max_new_tokens, settings, seed=seed, separator=separator, dtype=dtype
    )
    return _decoded(restored.tokenizer.stream(prompt_tokens), tokens, stop)


def _decoded(decoder: StreamDecoder, tokens: Iterator[int], stop: StopRequest) -> Iterator[str]:
    for token in tokens:
        if stop:
            break
        yield decoder.push(token)
    yield decoder.flush()
