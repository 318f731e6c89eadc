"""Checks the options of `cda sample` that depend on more than their own value."""

from __future__ import annotations

from cda_cli.commands.sample_options import AUTO
from cda_cli.errors import ConfigError


def checked_batch_size(batch_size: str) -> int | None:
    """Returns the number, or None for `auto`. Raises ConfigError for another word."""
    if batch_size == AUTO:
        return None
    if not (batch_size.isdecimal() and int(batch_size) > 0):
        raise ConfigError(f"--batch-size {batch_size!r} is not possible; give {AUTO}, or a number from 1 on")
    return int(batch_size)


def check_output(forms: dict[str, bool], has_logprobs: bool) -> None:
    """Raises ConfigError where several forms of output are asked for, or log-probabilities in one without them.

    `forms` says which options are given.
    """
    given = [form for form, wanted in forms.items() if wanted]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other; give one of them")
    if has_logprobs and not (forms["--json"] or forms["--jsonl"]):
        raise ConfigError("--logprobs is told in JSON alone; add --json or --jsonl")
