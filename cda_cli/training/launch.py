"""From one command to several processes and back: torchrun's launcher, and one voice among what it has started.

    cda train --devices 4 …                     launch: torchrun's agent starts this command line four times
    torchrun … -m cda_cli train …               the same, on one machine or many

Each process finds its place in the environment. Here torch is imported only where it is needed, so that a wrong
setting is said at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from cda_cli.config import Config
from cda_cli.errors import ConfigError, TrainingError, exit_code
from cda_cli.signals import StopRequest

NOT_BEGUN = "stopped before the first step, with nothing to save; the same command starts again"
ERROR = "error"  # under which the store has the exit code, once a process has met an error
HEAD_START = 1.0  # seconds that the first process has to speak before another does
POLL = 0.1  # seconds between two looks


@dataclass(frozen=True)
class Place:
    """Of this process among the `processes` of a run: `rank` over all machines, `local_rank` on its own `machine`."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0
    local_processes: int = 1
    machine: int = 0

    @staticmethod
    def of(environment: Mapping[str, str]) -> Place:
        """As torchrun says in the environment of what it starts; alone where it says nothing."""
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            return Place()
        rank, processes = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return Place(
            rank,
            processes,
            int(environment.get("LOCAL_RANK", rank)),
            int(environment.get("LOCAL_WORLD_SIZE", processes)),
            int(environment.get("GROUP_RANK", 0)),
        )


def count_processes(config: Config, place: Place, devices: int, dry_run: bool) -> int:
    """Those that torchrun has started, or else `--devices`.

    Raises ConfigError where they cannot share the sequences of a step evenly, and where settings do not go together.
    """
    started, optim = place.processes, config.optim
    if started > 1 and devices not in (1, place.local_processes):
        raise ConfigError(
            f"torchrun has started {place.local_processes} processes on this machine; leave out --devices"
        )
    processes, sequences = max(started, devices), optim.batch_size * optim.grad_accum
    if processes > 1 and dry_run:
        raise ConfigError("--dry-run tries one process; leave out --devices, or torchrun")
    if processes > 1 and ":" in config.run.device:
        raise ConfigError(f"--device {config.run.device} is for one process, and there are {processes}; give cuda")
    if processes > 1 and config.run.parallel == "fsdp" and optim.optimizer == "muon":
        raise ConfigError(
            "Muon takes whole matrices, and fsdp cuts them; give --parallel ddp, or --set optim.optimizer=adamw"
        )
    if sequences % processes:
        raise ConfigError(
            f"a step has {sequences} sequences (batch_size {optim.batch_size} × grad_accum {optim.grad_accum}), which "
            f"{processes} processes cannot share evenly; choose --batch-size or --grad-accum so that their product is "
            f"a multiple of {processes}"
        )
    return processes


def launch(processes: int, stop: StopRequest) -> int:
    """Runs this very command line in `processes` processes on this machine, and returns the exit code of the run.

    A request to stop goes on to each of them, and is waited for as long as it takes them to save. Raises
    InterruptedRunError where they were not yet there to say so, and TrainingError where one was killed and none could
    say why.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of sockets and of groups left behind
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # The agent would wait for half a minute only, and not tell how it ended; this one ends a single process too.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    from torch.distributed.elastic.agent.server.api import WorkerSpec
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

    meeting = get_rendezvous_handler(
        RendezvousParameters("c10d", "localhost:0", uuid.uuid4().hex, 1, 1, local_addr="localhost")
    )
    command = ("-m", "cda_cli", *sys.argv[1:])
    spec = WorkerSpec(
        "train", processes, meeting, entrypoint=sys.executable, args=command, max_restarts=0, local_addr="localhost"
    )
    with tempfile.TemporaryDirectory(prefix="cda-launch-") as logs:
        agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=logs))
        threading.Thread(target=_pass_on, args=(stop, agent), daemon=True).start()
        try:
            result = agent.run()
        except SignalException as ended:
            return 128 + ended.sigval
        finally:
            meeting.shutdown()
    return _exit_code([failure.exitcode for failure in result.failures.values()], stop)


def _pass_on(stop: StopRequest, agent: Any) -> None:
    """Sends SIGTERM to the workers of `agent` once a stop is asked for and they are all there.

    Never SIGINT: one that is still importing would answer it with a traceback.
    """
    while not (stop and (workers := agent.get_worker_group().workers) and all(worker.id for worker in workers)):
        time.sleep(POLL)
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.id, signal.SIGTERM)


def _exit_code(codes: list[int], stop: StopRequest) -> int:
    """The one for all, from those of the processes that did not end with 0; below 0 is the signal that ended one."""
    if not codes:
        return 0
    code = max(codes)  # one that a process has chosen, where there is one
    if code == -signal.SIGTERM:
        stop.check(NOT_BEGUN)
    if stop.signal_number is not None and code == 128 + signal.SIGTERM:
        return 128 + stop.signal_number
    if code < 0:
        name = signal.Signals(-code).name
        raise TrainingError(f"a process of this run was ended by {name}; the same command goes on from what was saved")
    return code


class OneVoice:
    """While entered, an error in one of several processes ends all of them with one sentence and one exit code.

    Whoever meets it first says so in the store that all share, and lets the error pass to be told; the others leave
    without a word. The first process has a head start, so that what all of them meet is told by that one.
    """

    def __init__(self) -> None:
        self.place = Place.of(os.environ)
        self._store: Any = None

    def store(self) -> Any:
        """The store of torchrun, which outlives the processes: so these take what is of their attempt only."""
        if self._store is None:
            from torch.distributed import PrefixStore  # type: ignore[attr-defined]
            from torch.distributed.rendezvous import rendezvous

            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"attempt {attempt}", next(rendezvous("env://"))[0])
        return self._store

    def __enter__(self) -> OneVoice:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.place.processes == 1 or not isinstance(error, Exception):
            return
        # The launcher ends the others as soon as one has gone: that must not cut short what this one says.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        from torch.distributed import DistError

        try:
            code = self._claim(exit_code(error))
        except DistError:
            code = 1  # the store has gone, and the run with it
        if code is not None:
            sys.exit(code)
        if isinstance(error, RuntimeError) and (isinstance(error, DistError) or "gloo" in str(error)):
            raise TrainingError(
                "another process of this run has gone without a word (out of memory, or killed); the same command "
                "goes on from what was saved"
            ) from error

    def _claim(self, code: int) -> int | None:
        """None where it is this process that speaks, and its exit code is for all; else that of the one that does."""
        store = self.store()
        until = time.monotonic() + (HEAD_START if self.place.rank else 0)
        while time.monotonic() < until and not store.check([ERROR]):
            time.sleep(POLL)
        if store.add("speaking", 1) > 1:
            return int(store.get(ERROR))
        store.set(ERROR, str(code))
        return None
