"""One of several processes hangs, and the others end and name it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection

from cda_cli.config import parse
from cda_cli.errors import TrainingError
from cda_cli.signals import StopRequest
from cda_cli.training.distributed.launch import ErrorCoordinator
from cda_cli.training.distributed.processes import join
from tests.reliability.harness import FORKS, become_rank, exit_code, free_port, start
from tests.reliability.variants import broken

PROCESSES = 3
MINUTES = 0.02  # that the others wait
BEFORE = -1  # the step of a process that hangs before it meets the others, and so has not said what it is called


def steps(rank: int, port: int, hangs_at: int | None, variant: str, said: Connection) -> None:
    """Takes part, in a child, in what processes agree on after each step, and hangs once. Says what it raised."""
    become_rank(rank, PROCESSES, port)
    try:
        with broken(variant), ErrorCoordinator() as coordinator, StopRequest() as stop:
            if hangs_at == BEFORE:
                coordinator.store()  # Rank 0 waits until all have come to the store that it holds.
                os.kill(os.getpid(), signal.SIGSTOP)
            agreed = join(coordinator, parse({"run": {"process_timeout": MINUTES, "device": "cpu"}})).agreed(stop)
            for step in range(PROCESSES):
                if step == hangs_at:
                    os.kill(os.getpid(), signal.SIGSTOP)
                agreed.agree()
    except TrainingError as error:
        said.send(str(error))


def hangs(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Stops any process before the first step or at any, as a disk or a driver that does not answer stops one."""
    chance = random.Random(seed)
    for trial in range(count):
        # Rank 0 holds the store here, which otherwise is the launcher's.
        hanging, step = chance.randrange(1, PROCESSES), BEFORE + trial % (PROCESSES - BEFORE)
        port = free_port()
        listener, said = FORKS.Pipe(duplex=False)
        children = [
            start(steps, rank, port, step if rank == hanging else None, variant, said) for rank in range(PROCESSES)
        ]
        said.close()
        sentence = listener.recv()
        named = f"process {hanging} " + ("hangs" if step == BEFORE else f"(pid {children[hanging].pid} on ")
        os.kill(children[hanging].pid or 0, signal.SIGKILL)
        codes = [exit_code(child) for child in children]
        others = [code for rank, code in enumerate(codes) if rank != hanging]
        if not sentence.startswith(named) or " and process" in sentence or "\n" in sentence:
            yield f"process {hanging} hung at step {step}, and it was said: {sentence}"
        else:
            yield None if sorted(others) == [0, 1] else f"the processes ended with {codes}"
        listener.close()
