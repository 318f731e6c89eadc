"""Trains in a process of its own, as a line of JSON says: `python -m tests.reliability.fresh LINE`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import tests.conftest  # noqa: F401 - one thread, before torch is imported
from cda_cli.config import Config, parse
from cda_cli.errors import InterruptedRunError
from cda_cli.runtime import cpu_threads
from tests.reliability import micro
from tests.reliability.harness import exit_code, speak_into, start
from tests.reliability.variants import broken
from tests.training.helpers import changed, trained

ROOT = Path(__file__).parents[2]


def train_afresh(
    config: Config,
    run: Path,
    cache: Path,
    *,
    steps: int,
    stop_after: int | None = None,
    variant: str = "",
    forked: bool = False,
) -> str | None:
    """Trains in a new interpreter, and says what went wrong.

    With `forked`, the process is a fork of one that has only imported. It starts in a tenth of the time, but cannot use
    a GPU. A broken variant is tried in such a fork where it can be.
    """
    settings = changed(config, steps=steps).model_dump()
    line = json.dumps({"config": settings, "run": str(run), "stop_after": stop_after, "variant": variant})
    if (forked or variant) and config.run.device == "cpu":
        code = exit_code(start(train_in_fork, line, cache, run.parent / "said"))
        return None if code == 0 else f"training ended with {code}: {(run.parent / 'said').read_text()[-2000:]}"
    command = [sys.executable, "-m", "tests.reliability.fresh", line]
    done = subprocess.run(command, cwd=ROOT, env=micro.environment(cache), capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"training ended with {done.returncode}: {done.stderr[-2000:]}"


def train_in_fork(line: str, cache: Path, said: Path) -> None:
    os.environ["CDA_CACHE"] = str(cache)
    speak_into(said)
    with cpu_threads(micro.THREADS):
        train(line)


def train(line: str) -> None:
    given = json.loads(line)
    with broken(given["variant"]):
        try:
            trained(parse(given["config"]), Path(given["run"]), stop_after=given["stop_after"])
        except InterruptedRunError:
            if given["stop_after"] is None:
                raise


if __name__ == "__main__":
    train(sys.argv[1])
