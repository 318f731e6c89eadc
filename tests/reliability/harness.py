"""What the experiments share: trials, their sum, and processes to try things in.

An experiment is a generator function of (count, seed, variant): for each trial it yields None where the promise held,
or a sentence that says what did not. `variant` names a deliberately broken version of the product (see `variants`), or
is empty.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

Trials = Callable[[int, int, str], Iterator[str | None]]

# Children are forked from a process that has imported everything and done nothing: as good as new, in milliseconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.reliability.preload"])


@dataclass(frozen=True)
class Experiment:
    """A promise, the trials that could break it, how many of them there are, and variants that must break it."""

    promise: str
    trials: Trials
    full: int
    reduced: int
    variants: tuple[str, ...]


@dataclass
class Sum:
    """The numbers of trials and failures; `first` is the sentence of the first failure."""

    tried: int = 0
    failed: int = 0
    first: str | None = None

    def add(self, failure: str | None) -> None:
        self.tried += 1
        if failure is not None:
            self.failed += 1
            self.first = self.first or failure


def upper_bound(tried: int, failed: int, confidence: float = 0.95) -> float:
    """Returns the largest rate of failure that is still compatible with `failed` of `tried`.

    At this rate, so few failures or fewer have a probability of 1 − confidence (Clopper and Pearson, one-sided).
    """
    if failed >= tried:
        return 1.0
    low, high = failed / tried, 1.0
    for _ in range(60):
        rate = (low + high) / 2
        terms = (math.comb(tried, k) * rate**k * (1 - rate) ** (tried - k) for k in range(failed + 1))
        low, high = (rate, high) if sum(terms) > 1 - confidence else (low, rate)
    return high


def results(trials: Trials, count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Yields the results of the trials. An exception ends them as a failure, since no promise allows a traceback."""
    try:
        yield from trials(count, seed, variant)
    except Exception:  # noqa: BLE001 - whatever it is
        yield traceback.format_exc()


def start(target: Callable[..., object], *arguments: Any) -> BaseProcess:
    """Starts a child that calls `target(*arguments)`."""
    process = FORKS.Process(target=target, args=arguments)
    process.start()
    return process


def exit_code(process: BaseProcess, seconds: float = 60.0) -> int | None:
    """Returns how a child ended, −N for signal N.

    It kills a child that has not ended after that time, and returns None.
    """
    process.join(seconds)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    process.close()
    return code


def free_port() -> int:
    """Returns a port at which processes can meet."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def become_rank(rank: int, processes: int, port: int) -> None:
    """Makes a child one of several processes of this machine, as torchrun would. They meet at a port of the first."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}


def become_cda(arguments: list[object], cache: Path, said: Path) -> None:
    """Runs `cda ARGUMENTS` in a child, with its output in the file `said`, and ends the process."""
    from cda_cli.main import run

    os.environ["CDA_CACHE"] = str(cache)
    speak_into(said)
    sys.argv = ["cda", *map(str, arguments)]
    run()


def speak_into(said: Path) -> None:
    """Redirects what this process prints into a file."""
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
