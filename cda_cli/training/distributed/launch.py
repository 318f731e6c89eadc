"""Starts one command in several processes, with torchrun's launcher, and coordinates their errors.

    cda train --devices 4 …                     launch: torchrun's agent starts this command line four times
    torchrun … -m cda_cli train …               the same, on one machine or many

Each process finds its place in the environment. This module imports torch inside its functions, so that the error for a
wrong setting comes at once.
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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from cda_cli.config import Config, RunConfig
from cda_cli.errors import ConfigError, TrainingError, exit_code
from cda_cli.signals import StopRequest

STOPPED_BEFORE_START = "stopped before the first step, with nothing to save; the same command starts again"
ERROR = "error"  # the key in the store of the exit code, once a process has met an error
WAITED, NAME = "waited", "name"  # keys in the store, each with a rank: a process waited in vain; what it is called
TIMED_OUT = "timed out"  # the key in the store once a process has waited for run.process_timeout
GRACE = 2.0  # seconds in which all processes that wait for the same one give up, once the first has
HEAD_START = 1.0  # seconds that the first process has to report an error before another process does
POLL = 0.1  # seconds between two looks at the store
# PyTorch reads it when it is imported. It then does not warn of sockets and groups left behind, nor of an option of DDP
# that a run needs for other reasons than DDP expects.
QUIET = "TORCH_CPP_LOG_LEVEL", "ERROR"


@dataclass(frozen=True)
class Place:
    """The place of this process among the `processes` of a run: `rank` over all machines, `local_rank` on its own."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0
    local_processes: int = 1
    machine: int = 0

    @staticmethod
    def of(environment: Mapping[str, str]) -> Place:
        """Reads what torchrun sets in the environment of its processes; without that, this process is alone."""
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


class Mesh(NamedTuple):
    """`groups` groups of `parts` processes each. The groups divide the sequences of a step, and a group each of them.

    `shards` says whether all processes together divide the weights.
    """

    groups: int
    parts: int
    shards: bool

    @staticmethod
    def of(run: RunConfig, processes: int) -> Mesh:
        """Returns the mesh that the settings ask for. Raises ConfigError if the `processes` do not make it up.

        A single process is a mesh by itself, so that it can go on with a run of several.
        """
        if processes == 1 or (run.mesh is None and run.parallel == "cp"):
            return Mesh(1, processes, shards=False)
        if run.mesh is None:
            return Mesh(processes, 1, shards=run.parallel == "fsdp")
        axes = {name: int(size) for name, size in (axis.split("=") for axis in run.mesh.split(","))}
        groups, parts = axes.get("dp", processes // axes["cp"]), axes["cp"]
        if groups * parts != processes:
            raise ConfigError(
                f"there are {processes} processes, which --mesh {run.mesh} does not make up; give another --mesh, "
                "another number of --devices, or --set run.mesh=null"
            )
        return Mesh(groups, parts, shards=True)

    def __str__(self) -> str:
        """In the words of the settings: "4, fsdp"."""
        names = ["fsdp"] if self.shards else ["ddp"] if self.groups > 1 else []
        names += [f"cp={self.parts}"] if self.parts > 1 and self.groups > 1 else ["cp"] if self.parts > 1 else []
        return ", ".join([str(self.groups * self.parts), *names])


def count_processes(config: Config, place: Place, devices: int, dry_run: bool) -> int:
    """Returns the number of processes that torchrun has started, or else `devices`.

    Raises ConfigError if they cannot share a step evenly, or if settings exclude each other.
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
    mesh = Mesh.of(config.run, processes)
    if mesh.shards and optim.optimizer == "muon":
        if config.run.mesh is not None:
            raise ConfigError(
                "Muon takes whole matrices, and a mesh cuts them; give --parallel cp and --set run.mesh=null, or --set "
                "optim.optimizer=adamw"
            )
        raise ConfigError(
            "Muon takes whole matrices, and fsdp cuts them; give --parallel ddp, or --set optim.optimizer=adamw"
        )
    if sequences % mesh.groups:
        sharing = f"{processes} processes" if mesh.parts == 1 else f"{mesh.groups} groups of processes"
        raise ConfigError(
            f"a step has {sequences} sequences (batch_size {optim.batch_size} × grad_accum {optim.grad_accum}), which "
            f"{sharing} cannot share evenly; choose --batch-size or --grad-accum so that their product is "
            f"a multiple of {mesh.groups}"
        )
    if mesh.parts > 1 and config.model.seq_len % (2 * mesh.parts):
        raise ConfigError(
            f"{mesh.parts} processes divide a sequence into {2 * mesh.parts} equal chunks, and it has "
            f"{config.model.seq_len} tokens; choose --seq-len so that it is a multiple of {2 * mesh.parts}, or divide "
            "it among another number of processes"
        )
    return processes


@contextlib.contextmanager
def log_level(name: str, level: int) -> Iterator[None]:
    """Sets the level of a logger, and restores it at the end."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def agent_environment(processes: int) -> Iterator[None]:
    """Sets the variables that torchrun's agent reads and passes on to its workers, and restores them at the end."""
    before = dict(os.environ)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault(*QUIET)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # If the agent handled SIGTERM, it would wait for half a minute only, and hide how the run ended. So it handles only
    # SIGQUIT, which ends a run in one process too.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@log_level("torch.distributed.elastic", logging.CRITICAL)
def launch(processes: int, stop: StopRequest) -> int:
    """Runs this very command line in `processes` processes on this machine, and returns the exit code of the run.

    It passes a request to stop on to each of them, and waits for as long as they take to save. Raises
    InterruptedRunError if the stop came before they could report it, and TrainingError if one was killed and no process
    could say why.
    """
    with agent_environment(processes), tempfile.TemporaryDirectory(prefix="cda-launch-") as logs:
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
        agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=logs))
        ended = threading.Event()
        forwarder = threading.Thread(target=_forward_stop, args=(stop, agent, ended), daemon=True)
        forwarder.start()
        try:
            result = agent.run()
        except SignalException as signalled:
            return 128 + signalled.sigval
        finally:
            ended.set()
            forwarder.join()
            meeting.shutdown()
    return _exit_code([failure.exitcode for failure in result.failures.values()], stop)


def _forward_stop(stop: StopRequest, agent: Any, ended: threading.Event) -> None:
    """Sends SIGTERM to the workers of `agent` once a stop is asked for and all workers have started.

    It never sends SIGINT, to which a worker that is still importing would answer with a traceback. It returns once the
    run has `ended`.
    """
    while not ended.wait(POLL):
        workers = agent.get_worker_group().workers
        if stop and workers and all(worker.id for worker in workers):
            for worker in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.id, signal.SIGTERM)
            return


def _exit_code(codes: list[int], stop: StopRequest) -> int:
    """Returns the exit code of the run, from the `codes` of processes that failed: below 0 is the signal of one."""
    if not codes:
        return 0
    code = max(codes)  # prefers a code that a process chose to a signal that ended it
    if code == -signal.SIGTERM:
        stop.check(STOPPED_BEFORE_START)
    if stop.signal_number is not None and code == 128 + signal.SIGTERM:
        return 128 + stop.signal_number
    if code < 0:
        name = signal.Signals(-code).name
        raise TrainingError(f"a process of this run was ended by {name}; the same command goes on from what was saved")
    return code


class ErrorCoordinator:
    """While entered, an error in one of several processes ends all of them with one sentence and one exit code.

    The process that meets an error first claims it in the store that all share, and raises it on, so that it is shown.
    The others exit silently. The first process has a head start, so that it reports the errors that all processes meet.
    """

    def __init__(self) -> None:
        self.place = Place.of(os.environ)
        if self.place.processes > 1:
            os.environ.setdefault(*QUIET)
        self._store: Any = None

    def store(self) -> Any:
        """Returns torchrun's store. It outlives the processes, so each attempt uses a prefix of its own."""
        if self._store is None:
            from torch.distributed import PrefixStore  # type: ignore[attr-defined]
            from torch.distributed.rendezvous import rendezvous

            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            self._store = PrefixStore(f"attempt {attempt}", next(rendezvous("env://"))[0])
        return self._store

    def __enter__(self) -> ErrorCoordinator:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.place.processes == 1 or not isinstance(error, Exception):
            return
        # The launcher ends all processes once one of them has ended. That must not cut this one's error message short.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        from torch.distributed import DistError

        waited = isinstance(error, RuntimeError) and (isinstance(error, DistError) or "gloo" in str(error))
        try:
            if waited:
                self.store().set(f"{WAITED}/{self.place.rank}", "")
                # gloo says the former, and the store, in which processes meet, the latter.
                if any(words in str(error) for words in ("Timed out", "timeout")):
                    self.store().set(TIMED_OUT, "")
            code = self._claim(exit_code(error))
            if code is None and waited:
                raise TrainingError(self._waited_for()) from error
        except DistError:
            code = 1  # the store has ended, and with it the run
        if code is not None:
            sys.exit(code)

    def _waited_for(self) -> str:
        """Says which process this one waited for in vain: all others soon say that they waited, too."""
        time.sleep(GRACE)
        store = self.store()
        # The first that gives up closes its connections, so that others meet the same error as if one had gone.
        if not store.check([TIMED_OUT]):
            return (
                "another process of this run has gone without a word (out of memory, or killed); the same command goes "
                "on from what was saved"
            )
        silent = [rank for rank in range(self.place.processes) if not store.check([f"{WAITED}/{rank}"])]
        keys = {rank: f"{NAME}/{rank}" for rank in silent}
        # A process that hangs before it meets the others has not said what it is called.
        names = [store.get(key).decode() if store.check([key]) else f"process {rank}" for rank, key in keys.items()]
        return (
            f"{' and '.join(names) or 'a process'} hangs: the others have waited for run.process_timeout; look there "
            "for what it waits for (py-spy dump), and the same command goes on from what was saved"
        )

    def _claim(self, code: int) -> int | None:
        """Returns None if this process reports its error, and sets the exit code of all; else returns that code."""
        store = self.store()
        until = time.monotonic() + (HEAD_START if self.place.rank else 0)
        while time.monotonic() < until and not store.check([ERROR]):
            time.sleep(POLL)
        if store.add("claims", 1) > 1:
            return int(store.get(ERROR))
        store.set(ERROR, str(code))
        return None
