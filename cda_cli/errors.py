"""The errors that a user can meet: each has one sentence that names the remedy, and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or bad input, 3 a check that the user asked for failed. A run that was
interrupted, and saved, exits with 129 (SIGHUP), 130 (SIGINT), 143 (SIGTERM), or 141 (stdout was lost). This module
imports no torch.
"""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Iterable

MEMORY_USED_UP = "memory is used up"  # in the sentence of each command that ended for lack of memory


class CdaError(Exception):
    """Anything that the user can mend. The message is one sentence with its remedy; `main` prints it and exits."""

    exit_code = 2


class ConfigError(CdaError):
    """A setting that is unknown, or that has no meaning."""


class UsageError(CdaError):
    """A command line that no command takes."""


class DataError(CdaError):
    """Data that is missing, empty, too short or out of reach."""


class CheckpointError(CdaError):
    """A checkpoint that is missing or damaged, or whose configuration does not fit."""


class StorageError(CdaError):
    """A write that failed (a full disk, a folder that cannot be written)."""


class DeviceError(CdaError):
    """A device or a backend that this machine does not have."""


class OutputLostError(CdaError):
    """Stdout cannot be written. If its reader has gone, the message is empty, since nobody would read it."""

    def __init__(self, error: OSError) -> None:
        reader_left = isinstance(error, BrokenPipeError)
        super().__init__("" if reader_left else f"stdout cannot be written ({error.strerror}); send it elsewhere")
        self.exit_code = 128 + signal.SIGPIPE if reader_left else 2


class CheckFailedError(CdaError):
    """A check that the user asked for did not hold."""

    exit_code = 3


class TrainingError(CdaError):
    """A run that cannot go on, such as one whose loss is no longer finite."""

    exit_code = 1


class InterruptedRunError(CdaError):
    """The run was asked to stop, and saved first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def exit_code(error: Exception) -> int:
    """Returns the exit code of a command that ends with `error`."""
    if isinstance(error, CdaError):
        return error.exit_code
    return 2 if isinstance(error, OSError) and error.filename else 1


def brief(error: BaseException) -> str:
    """What an error says, in a few words that fit into a sentence: its first line, or that of the operating system."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not {error.encoding}, at byte {error.start}"
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    lines = said.strip().splitlines() or [type(error).__name__]
    return lines[0][:200].rstrip(" .:")


def requirement(message: str) -> str:
    """A message of pydantic, "Input should be a valid number, unable to parse …", without what its parser did.

    Of a ValueError, "Value error, …", it is the message of that error.
    """
    message = message.removeprefix("Value error, ")
    return re.sub(r", (?:unable to|got) .*", "", message[:1].lower() + message[1:])


def did_you_mean(word: str, known: Iterable[str], otherwise: str | None = None, cutoff: float = 0.5) -> str:
    """Returns `did you mean 'NEAREST'?`, or `otherwise` if nothing is near: by default the list of the known words.

    Options are compared without their dashes, which all of them have.
    """
    names = {name.lstrip("-"): name for name in sorted(known)}
    near = difflib.get_close_matches(word.lstrip("-"), names, n=1, cutoff=cutoff)
    return f"did you mean {names[near[0]]!r}?" if near else otherwise or f"known: {', '.join(names.values())}"
