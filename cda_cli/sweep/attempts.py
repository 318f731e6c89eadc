"""The attempts of a sweep's jobs: a line of JSON for each process that ended, in the folder of the sweep."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cda_cli.version import __version__

FILE = "attempts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A process of a job: how it ended, and where it ran.

    `began` is in UTC, by ISO 8601. `exit_code` is below 0 if a signal ended it. `error` is the last line of its log, or
    empty if it did not fail or was stopped. `commit` is that of the code, or empty where that is not in a git checkout.
    `versions` are those of cda, Python and its libraries, which older records lack.
    """

    job: str
    command: str
    began: str
    seconds: float
    exit_code: int
    error: str
    machine: str
    device: str
    version: str = __version__
    commit: str = ""
    versions: str = ""

    @property
    def arm(self) -> str:
        """The arm or the trunk of the job."""
        return self.job.partition(",")[0]


def append(folder: Path, attempt: Attempt) -> None:
    with (folder / FILE).open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        is_cut = file.read() not in (b"", b"\n")  # as by a full disk; the next line must not be lost too
        file.write(b"\n" * is_cut + json.dumps(asdict(attempt)).encode() + b"\n")


def read(folder: Path) -> list[Attempt]:
    """The attempts, oldest first. A line that a kill has cut short is left out."""
    try:
        lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            found.append(Attempt(**json.loads(line)))
    return found


def latest(attempts: Iterable[Attempt]) -> dict[str, Attempt]:
    """The latest attempt of each job, by its name."""
    return {attempt.job: attempt for attempt in attempts}


def machine() -> str:
    """The processor, the cores that this process may use, and the GPUs of NVIDIA."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    gpus = Counter(_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines())
    named = [f"{number} × {name}" for name, number in gpus.items()]
    return ", ".join([model, f"{len(os.sched_getaffinity(0))} cores", *named])


def commit() -> str:
    """The commit of the code that runs, with a + where files differ from it; empty outside of a git checkout."""
    package = Path(__file__).parent.parent
    # Installed code may lie in the checkout of another program, which ignores it.
    if not _output("git", "-C", package, "ls-files", "sweep"):
        return ""
    revision = _output("git", "-C", package, "rev-parse", "--short=12", "HEAD")
    return revision + "+" * bool(_output("git", "-C", package, "status", "--porcelain", "--untracked-files=no", "."))


def _output(*command: str | Path) -> str:
    """What a program prints; empty if it fails, or if there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> str:
    """The versions of cda and Python, and those of PyTorch and Triton where they are installed."""
    found = [f"cda {__version__}", f"Python {platform.python_version()}"]
    for name, package in {"PyTorch": "torch", "Triton": "triton"}.items():
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(package)}")
    return ", ".join(found)


def distinct(values: Sequence[str]) -> list[str]:
    """Each value once, in the order in which they came first."""
    return list(dict.fromkeys(value for value in values if value))
