"""`cda` in a process of its own, forked from one that has imported everything: in a tenth of an interpreter's time.

What the interpreter does before `cda` runs is not in it. The tests of that start one: `helpers.py: in_subprocess`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, TextIO

from tests.commands.helpers import Result, on_cpu
from tests.reliability.harness import FORKS, start

# The file of each stream by its number, or None for one that is closed.
Streams = Mapping[int, str | Path | None]
NAMES = ("stdin", "stdout", "stderr")


class Running(NamedTuple):
    """A command that runs, and what it says."""

    process: BaseProcess
    stdout: TextIO
    stderr: TextIO

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, for which this waits."""
        self.process.join()
        return self.process.exitcode


@contextlib.contextmanager
def popen_forked(*args: object) -> Iterator[Running]:
    """`cda ARGS` with a pipe each from its stdout and stderr; within it the command runs, and at the end it has ended.

    It works on the CPU, as all that is forked from that process.
    """
    (out, told), (err, warned) = FORKS.Pipe(duplex=False), FORKS.Pipe(duplex=False)
    process = start(_become_cda, on_cpu(*args), dict(os.environ), {1: told, 2: warned}, None)
    told.close()
    warned.close()
    with out, err:
        stdout, stderr = (os.fdopen(os.dup(pipe.fileno()), encoding="utf-8") for pipe in (out, err))
    try:
        with stdout, stderr:
            yield Running(process, stdout, stderr)
    finally:
        process.join()
        process.close()


def run_forked(*args: object, streams: Streams | None = None, first: Callable[[], None] | None = None) -> Result:
    """`cda ARGS`, with some of its `streams` elsewhere, after the child has called `first`."""
    with tempfile.TemporaryDirectory() as folder:
        files = {number: Path(folder, NAMES[number]) for number in (1, 2)}
        process = start(_become_cda, on_cpu(*args), dict(os.environ), {**files, **(streams or {})}, first)
        process.join()
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in files.values())
        assert process.exitcode is not None
        return Result(process.exitcode, out, err)


def signal_at(number: int, event: str, name: str) -> None:
    """Has this process send itself a signal at an event of Python whose first argument ends with `name`."""

    def hook(happened: str, arguments: tuple[object, ...]) -> None:
        if happened == event and str(arguments[0]).endswith(name):
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def _become_cda(
    arguments: list[str],
    environment: dict[str, str],
    streams: Mapping[int, Connection | str | Path | None],
    first: Callable[[], None] | None,
) -> None:
    """Runs in the child, with the streams as a shell and the interpreter leave them."""
    from cda_cli.main import run

    os.environ.clear()
    os.environ.update(environment)
    for number, stream in streams.items():
        if stream is None:
            os.close(number)
            setattr(sys, NAMES[number], None)
            setattr(sys, f"__{NAMES[number]}__", None)
        elif isinstance(stream, Connection):
            os.dup2(stream.fileno(), number)
            stream.close()
        else:
            opened = os.open(stream, os.O_WRONLY | os.O_CREAT)
            os.dup2(opened, number)
            os.close(opened)
    if first:
        first()
    sys.argv = ["cda", *arguments]
    run()
