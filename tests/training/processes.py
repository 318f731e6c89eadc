"""Runs in several processes on this machine that meet as those of torchrun do, but import torch only once.

One process imports everything and then forks the ranks of each run: `python -m tests.training.processes`. A line of its
stdin is a job, and a line of its stdout has the exit codes of the ranks. They meet in one store, as in that of
torchrun's agent. As there, each run finds in the store what earlier attempts have left.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from cda_cli.training.distributed.launch import QUIET

PRELOADED = (
    "cda_cli.console", "cda_cli.training.run", "einops._torch_specific", "tests.commands.helpers",
    "torch._inductor.compile_fx", "torch._numpy",
)  # fmt: skip
# The imports ask CUDA whether it is there, and a process that is forked after that cannot use it: PyTorch fails with an
# initialization error as soon as it looks for a device. The ranks train on the CPU, so neither the process that forks
# them nor a rank sees a GPU.
NO_GPUS = {"CUDA_VISIBLE_DEVICES": ""}


class Ended(NamedTuple):
    """How each rank of a run ended, and what it said."""

    codes: list[int]
    out: list[str]
    err: list[str]


class Nursery:
    """Forks runs with `run`, and ends with its `with` block."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._runs = folder, 0

    def __enter__(self) -> Nursery:
        command, here = [sys.executable, "-m", __name__], {**os.environ, **NO_GPUS, **dict([QUIET])}
        self._process = subprocess.Popen(command, env=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._process.communicate()

    def run(
        self,
        count: int,
        *args: object,
        only: Mapping[int, Mapping[str, str]] | None = None,
        module: str = "cda_cli.main",
    ) -> Ended:
        """Runs `cda ARGS` in `count` processes, with `only[rank]` in the environment of one.

        Another `module` has another function `run`, which they call.
        """
        self._runs += 1
        said = [[self._folder / f"{self._runs}.{rank}.{stream}" for stream in ("out", "err")] for rank in range(count)]
        here = {**os.environ, **NO_GPUS, "PWD": str(Path.cwd())}
        environments = [{**here, **(only or {}).get(rank, {})} for rank in range(count)]
        called = {"module": module, "args": [str(arg) for arg in args]}
        job = {**called, "said": said, "environments": environments}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(job, default=str), file=self._process.stdin, flush=True)
        codes = json.loads(self._process.stdout.readline())
        out, err = ([path.read_text(encoding="utf-8") for path in paths] for paths in zip(*said, strict=True))
        return Ended(codes, out, err)


def main() -> None:
    # What a rank needs to train or to compile. Imported here, it costs its time once and not in each rank.
    for name in PRELOADED:
        importlib.import_module(name)
    # No rank looks for garbage among the objects of the imports, which would also copy their memory.
    gc.collect()
    gc.freeze()

    port = start_store()
    for attempt, line in enumerate(sys.stdin):
        job = json.loads(line)
        children = [fork(job, rank, port, attempt) for rank in range(len(job["said"]))]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def start_store() -> int:
    """Forks a process that holds the store for as long as this one and its ranks live, and returns the port.

    The store has threads. A rank forked from its process while a thread holds a lock would wait for the lock for ever.
    """
    from torch.distributed import TCPStore

    (port_read, port_write), (life_read, life_write) = os.pipe(), os.pipe()
    if os.fork():
        os.close(port_write)
        os.close(life_read)
        with os.fdopen(port_read) as line:
            return int(line.read())
    os.close(life_write)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(port_write, str(store.port).encode())
    os.close(port_write)
    os.read(life_read, 1)  # returns once nobody can write any more
    os._exit(0)


def fork(job: dict[str, Any], rank: int, port: int, attempt: int) -> int:
    child = os.fork()
    if child:
        return child
    for stream, path in enumerate(job["said"][rank], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    count = str(len(job["said"]))
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"} | job["environments"][rank] | place | meeting
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
    os.chdir(os.environ["PWD"])
    sys.argv = ["cda", *job["args"]]
    code: Any = 0
    try:
        importlib.import_module(job["module"]).run()
    except SystemExit as leaving:
        code = leaving.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
