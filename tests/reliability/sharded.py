"""Several processes save checkpoints together, each its shards, and any of them is killed."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch.distributed as dist

from cda_cli.storage import list_steps, newest
from cda_cli.training.distributed.launch import Place
from cda_cli.training.distributed.processes import Processes
from tests.reliability.harness import FORKS, exit_code, start
from tests.reliability.moments import Moments, every_call
from tests.reliability.saving import fault_of, kill_self, number, save
from tests.reliability.variants import broken

PROCESSES = 2
CALLS = (20_000, 4_000)  # the first process makes some five times as many calls as another does in the same saves


def save_together(
    run: Path, meeting: Path, rank: int, last: int | None, kill_at: int | None, variant: str, said: Connection
) -> None:
    """Saves up to step `last`, or for ever, in a child that is process `rank`, and says each step that is published.

    At moment `kill_at` of all its calls it kills itself. It ends once another process has gone.
    """
    place = f"file://{meeting}"
    dist.init_process_group("gloo", place, timedelta(seconds=30), rank=rank, world_size=PROCESSES)
    processes, step = Processes(Place(rank, PROCESSES)), max(list_steps(run), default=0)
    with contextlib.suppress(RuntimeError), broken(variant), Moments(every_call, kill_at, kill_self):
        while step != last:
            step += 1
            save(run, step, processes)
            processes.wait()
            said.send(step)


def started(
    run: Path, meeting: Path, last: int | None, kill: tuple[int, int] | None, variant: str
) -> tuple[list[BaseProcess], list[Connection]]:
    """Starts the processes. `kill` is a rank and the moment at which it kills itself."""
    children, listeners = [], []
    for rank in range(PROCESSES):
        listener, said = FORKS.Pipe(duplex=False)
        kill_at = kill[1] if kill and kill[0] == rank else None
        children.append(start(save_together, run, meeting, rank, last, kill_at, variant, said))
        said.close()
        listeners.append(listener)
    return children, listeners


def kills(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Sends SIGKILL to any of the processes at any of its calls while all save, rename and prune."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        run, step = Path(folder) / "run", 0
        for trial in range(count):
            rank = trial % PROCESSES
            kill = (rank, chance.randrange(CALLS[rank > 0]))
            children, listeners = started(run, Path(folder) / f"meeting{trial}", None, kill, variant)
            for listener in listeners:
                with contextlib.suppress(EOFError), listener:
                    while True:
                        step = max(step, listener.recv())
            codes = [exit_code(child) for child in children]
            if codes != [-9 if one == rank else 0 for one in range(PROCESSES)]:
                yield f"after kill {trial} of process {rank} the processes ended with {codes}"
                continue
            fault = fault_of(run, step)
            yield fault and f"after kill {trial} of process {rank}: {fault}"
            found, _ = newest(run)
            step = number(found) if found else 0


def finished_run(folder: Path) -> Path:
    """Makes a run with two checkpoints in shards."""
    children, listeners = started(folder / "run", folder / "meeting", 2, None, "")
    codes = [exit_code(child) for child in children]
    assert codes == [0] * PROCESSES
    for listener in listeners:
        listener.close()
    return folder / "run"
