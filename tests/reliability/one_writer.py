"""One process writes into the folder of a run; one that is killed does not keep the next one out."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import cda_cli.training.run
from cda_cli.storage import newest
from tests.reliability import micro
from tests.reliability.harness import FORKS, become_cda, exit_code, start
from tests.reliability.variants import broken

MANY = 10**6  # steps: more than any test waits for


class Writer(NamedTuple):
    """A child that trains. `line` gets a word when its loop begins, and ends with the child."""

    process: BaseProcess
    line: Connection
    said: Path


def train_at_once(arguments: list[object], cache: Path, said: Path, gate: Any, variant: str, line: Connection) -> None:
    """Trains in a child once the gate is open, and says when its loop begins."""
    train = cda_cli.training.run.train

    def telling(*given: Any) -> None:
        line.send_bytes(b"training")
        train(*given)

    gate.wait()
    with broken(variant):
        cda_cli.training.run.train = telling
        become_cda(arguments, cache, said)


def started(arguments: list[object], folder: Path, name: str, gate: Any, variant: str) -> Writer:
    line, told = FORKS.Pipe(duplex=False)
    said = folder / name
    process = start(train_at_once, arguments, folder / "cache", said, gate, variant, told)
    told.close()
    return Writer(process, line, said)


def trains(writer: Writer) -> bool:
    """Waits until the child trains or has ended."""
    try:
        writer.line.recv_bytes()
    except EOFError:
        return False
    return True


def pairs(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Starts two processes at once: exactly one trains, and the other names the owner of the folder.

    The one that trains is then stopped or killed, and the next one goes on from there.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = micro.settings(micro.mapped_text(folder), eval_every=0, save_every=0)
        settings = micro.write_settings(folder / "micro.yaml", config)
        for number in range(count):
            run = folder / f"run-{number}"
            arguments = ["train", "--config", settings, "--out", run, "--steps", MANY]
            fault = fault_of(arguments, folder, run, str(number), variant, killed=chance.random() < 0.5)
            yield fault and f"pair {number}: {fault}"


def fault_of(arguments: list[object], folder: Path, run: Path, name: str, variant: str, killed: bool) -> str | None:
    gate = FORKS.Event()
    both = [started(arguments, folder, f"{name}-{side}", gate, variant) for side in "ab"]
    gate.set()
    # Whoever trains does so for longer than this takes; the other ends by itself.
    running = [writer for writer in both if trains(writer)]
    fault = None if len(running) == 1 else f"{len(running)} of 2 trained"
    for writer in both:
        if writer not in running:
            code, words = exit_code(writer.process), writer.said.read_text()
            if not fault and (code != 2 or "is being written by" not in words or str(run / ".lock") not in words):
                fault = f"the one that did not train ended with {code} and said {words!r}"
    for writer in running:
        assert writer.process.pid is not None
        os.kill(writer.process.pid, signal.SIGKILL if killed else signal.SIGTERM)
        code = exit_code(writer.process)
        if code != (-signal.SIGKILL if killed else 128 + signal.SIGTERM):
            fault = fault or f"the one that trained ended with {code} and said {writer.said.read_text()!r}"
    if fault:
        return fault
    saved, _ = newest(run)
    steps = int(saved.name.removeprefix("step-")) + 2 if saved else 2
    after = started([*arguments[:-1], steps], folder, f"{name}-after", gate, variant)
    if (code := exit_code(after.process)) != 0:
        return f"the next one ended with {code} and said {after.said.read_text()!r}"
    return None if not (run / ".lock").exists() else "the lock is left"
