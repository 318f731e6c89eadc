"""Runs jobs as processes, as many at once as there are slots, until all have ended or a stop is asked for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Protocol

from cda_cli.errors import MEMORY_USED_UP, ConfigError
from cda_cli.runs.records import TrainRecord
from cda_cli.signals import StopRequest
from cda_cli.sweep.attempts import Attempt, append
from cda_cli.sweep.work import Job

POLL = 0.1  # seconds between two looks at the processes
READ = 1.0  # seconds between two looks at their records
LAST_BYTES = 4096  # of a log, in which its last line is looked for
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPED = {code for number in STOPS for code in (128 + number, -number)}  # exit codes: it has saved, or had just begun


@dataclass(frozen=True)
class Slot:
    """A place for a process. `device` is None for that of its settings."""

    device: str | None = None


def make_slots(jobs: int | None, devices: str | None) -> list[Slot]:
    """The places of `jobs` processes at once, by default one on each of the `devices`, which have commas between.

    Raises ConfigError.
    """
    names = [name.strip() for name in devices.split(",")] if devices is not None else [None]
    if not all(name is None or name for name in names):
        raise ConfigError(f"--devices {devices!r} names no device; give such as cuda:0,cuda:1")
    count = jobs or len(names)
    if count < len(names):
        raise ConfigError(f"--jobs {count} would leave devices of --devices {devices} idle; give {len(names)} or more")
    return [Slot(names[number % len(names)]) for number in range(count)]


@dataclass
class Running:
    """A job with its process. `record` is its newest train record."""

    job: Job
    device: str | None
    process: subprocess.Popen[bytes]
    log_start: int
    began: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    record: TrainRecord | None = None
    had_company: bool = False  # whether another process ran at some time

    def look(self) -> None:
        self.record = self.job.record()

    def last_line(self) -> str:
        """The last line that its process has said."""
        with self.job.log.open("rb") as log:
            log.seek(max(self.log_start, self.job.log.stat().st_size - LAST_BYTES))
            lines = log.read().decode("utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1].removeprefix("error: ") if said else ""

    def attempt(self, machine: str, commit: str, versions: str) -> Attempt:
        """What its process came to, once that has ended. To be stopped is no error."""
        code = self.process.returncode
        if code in STOPPED:
            error = ""
        elif code < 0:
            error = f"ended by {signal.Signals(-code).name}"
        elif code:
            error = self.last_line() or f"exit code {code}"
        else:
            error = "" if self.job.is_done() else "it ended before it was done"
        return Attempt(
            job=self.job.name,
            command=self.job.command(),
            began=self.began.isoformat(timespec="seconds"),
            seconds=round((datetime.now(timezone.utc) - self.began).total_seconds(), 3),
            exit_code=code,
            error=error,
            machine=machine,
            device=self.device or self.job.config.run.device,
            commit=commit,
            versions=versions,
        )


class Display(Protocol):
    """Shows a person how the jobs come on."""

    def started(self, running: Running) -> None: ...

    def ended(self, attempt: Attempt, running: Running) -> None: ...

    def refresh(self, running: Sequence[Running], waiting: int, held: Sequence[Job], *, stopping: bool) -> None:
        """`waiting` jobs are left to begin, and those that are `held` are done by other processes."""


@dataclass(frozen=True)
class Runner:
    """Runs jobs in the slots, and records how each ended in the folder `out`."""

    slots: Sequence[Slot]
    out: Path
    display: Display
    stop: StopRequest
    machine: str
    commit: str
    versions: str

    def run(self, jobs: Sequence[Job], others: Sequence[Job] = ()) -> None:
        """Runs those of the `jobs` that are not done, each once what it waits for is done.

        A job that has outlived an earlier sweep takes a slot, also one of the `others`, which are of other stages.
        A job that fails does not keep the others from running, but for those that wait for it. One that lacked memory
        beside others is tried again by itself, when all others have ended. Once a stop is asked for, it starts no more,
        passes the request on, and returns when all have saved.
        """
        blocked = [job for job in jobs if not job.is_done()]
        outlived = [job for job in others if job not in jobs and job.is_held()]
        running: dict[int, Running] = {}
        try:
            self._run(blocked, outlived, running)
        finally:  # No process stays behind an error, such as a disk that is full.
            _ask_to_stop(running.values())

    def _run(self, blocked: list[Job], outlived: Sequence[Job], running: dict[int, Running]) -> None:
        asked, looked = False, 0.0
        waiting = _take_ready(blocked)
        crowded: list[Job] = []  # those that lacked memory beside others
        while running or ((waiting or crowded) and not self.stop):
            held = [job for job in (*waiting, *outlived) if job.is_held()]
            alone = bool(crowded) and not (running or waiting or held)
            if alone:
                waiting.append(crowded.pop(0))
            for number in self._free(running, held)[: 1 if alone else None]:
                if not self.stop and (job := self._next(waiting, held)):
                    running[number] = self._start(job, self.slots[number])
                    self.display.started(running[number])
            if len(running) + len(held) > 1:
                for each in running.values():
                    each.had_company = True
            if self.stop and not asked:
                asked = True
                _ask_to_stop(running.values())
            time.sleep(POLL)
            ended = False
            for number, each in list(running.items()):
                if each.process.poll() is not None:
                    del running[number]
                    if each.process.returncode and each.job.is_held():
                        waiting.append(each.job)  # Another process was about to do it, and does.
                    else:
                        if _lacked_memory(self._end(each)) and each.had_company:
                            crowded.append(each.job)
                        ended = True
            if ended or not (running or waiting):  # Where none is left to wait, another process may have ended one.
                waiting += _take_ready(blocked)
            if time.monotonic() >= looked + READ:
                looked = time.monotonic()
                for each in running.values():
                    each.look()
            left = sum(job not in held for job in (*waiting, *blocked, *crowded))
            self.display.refresh(list(running.values()), left, held, stopping=bool(self.stop))

    def _free(self, running: Collection[int], held: Iterable[Job]) -> list[int]:
        """The numbers of the slots that neither a process of this sweep nor a job that is `held` takes."""
        free = [number for number in range(len(self.slots)) if number not in running]
        for job in held:
            device = job.device_in_use()
            taken = [number for number in free if not device or self.slots[number].device in (None, device)]
            free = [number for number in free if number not in taken[:1]]
        return free

    def _next(self, waiting: list[Job], held: Collection[Job]) -> Job | None:
        """Takes a job from those that are `waiting` and that no other process does, or has done meanwhile."""
        for job in [job for job in waiting if job not in held]:
            waiting.remove(job)
            if not job.is_done():
                return job
        return None

    def _start(self, job: Job, slot: Slot) -> Running:
        job.prepare()
        with job.log.open("ab") as log, job.output.open("ab") as output:
            start = log.tell()  # The process moves this place, which it shares, as soon as it writes.
            process = subprocess.Popen(
                [sys.executable, "-m", "cda_cli", *job.arguments(slot.device)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                env=_environment(len(self.slots)),
                # Ctrl-C of the terminal reaches this process alone, which passes it on once.
                start_new_session=True,
            )
            return Running(job, slot.device, process, start)

    def _end(self, running: Running) -> Attempt:
        running.look()
        if running.process.returncode == 0:
            running.job.finish()
        attempt = running.attempt(self.machine, self.commit, self.versions)
        append(self.out, attempt)
        self.display.ended(attempt, running)
        return attempt


def _lacked_memory(attempt: Attempt) -> bool:
    # The system kills a process when the memory of the machine is used up.
    return MEMORY_USED_UP in attempt.error or attempt.exit_code == -signal.SIGKILL


def _take_ready(blocked: list[Job]) -> list[Job]:
    """Takes those jobs from the `blocked` ones that need to wait for no other any longer."""
    ready = [job for job in blocked if not job.is_blocked()]
    blocked[:] = [job for job in blocked if job not in ready]
    return ready


def _ask_to_stop(running: Iterable[Running]) -> None:
    for each in running:
        # Not SIGINT, to which a process that is still importing answers with a traceback.
        each.process.send_signal(signal.SIGTERM)


def _environment(processes: int) -> Mapping[str, str]:
    """Shares the cores among the processes, which would otherwise take all of them each, to compute and to compile."""
    share = str(max(1, len(os.sched_getaffinity(0)) // processes))
    shared = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), share) if processes > 1 else {}
    return {**shared, **os.environ}
