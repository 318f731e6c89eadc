"""Measures the tokens a second of one process and of several, with a GPU each, with DDP, FSDP2 and divided sequences.

    python benchmarks/distributed.py
    python benchmarks/distributed.py --devices 4 --set model.attention=softmax --set model.learned_k=false
    python benchmarks/distributed.py --device cpu --preset tiny --steps 3

It runs the loop of `cda train` on a preset with GPT-2's vocabulary and its own batch, compiled, in bf16. Every run has
the same tokens a step (strong scaling): W processes share the grad_accum batches of a step. If grad_accum is a multiple
of W, each batch is as large as with one process. Processes that divide sequences take all batches. torchrun starts this
file again for each row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from synthetic import header, random_data, row
from training import measure, run_settings

from cda_cli.signals import StopRequest
from cda_cli.training.distributed.launch import ErrorCoordinator
from cda_cli.training.distributed.processes import join
from cda_cli.training.setup import build

LIMIT = 240  # seconds that a row may take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--steps", type=int, default=30, help="that are measured, after some that are not")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # set in what torchrun has started
    options = parser.parse_args()
    sets = [f"run.device={options.device}", *options.set, f"run.log_every={options.steps}"]
    if options.result:
        work(options.preset, sets, options.result)
    elif options.device == "cuda" and torch.cuda.device_count() < options.devices:
        print(f"benchmarks/distributed.py needs {options.devices} GPUs, and there are {torch.cuda.device_count()}")
    else:
        table(options.preset, options.devices, options.device)


def table(preset: str, devices: int, device: str) -> None:
    header(f"Training in several processes, preset {preset}, on a {'GPU each' if device == 'cuda' else 'CPU'}",
           "processes", "tokens/s", "× one", "waiting for data", "seconds, with start and compiling")  # fmt: skip
    rows = {"1": (1, "ddp"), **{f"{devices}, {parallel}": (devices, parallel) for parallel in ("ddp", "fsdp", "cp")}}
    speeds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="cda-bench-") as folder:
        for name, (count, parallel) in rows.items():
            began, result = time.perf_counter(), Path(folder) / name
            run_again(count, [*sys.argv[1:], "--set", f"run.parallel={parallel}", "--result", str(result)])
            if not result.exists():
                continue
            speeds[name], waited = json.loads(result.read_text(encoding="utf-8"))
            ratio = f"{speeds[name] / speeds['1']:.2f}" if "1" in speeds else "–"
            seconds = f"{time.perf_counter() - began:.0f}"
            row(name, f"{speeds[name] / 1e3:.1f} k", ratio, f"{waited:.2%}", seconds)
    if len(speeds) < len(rows):
        sys.exit(f"no figures of {', '.join(rows.keys() - speeds)}: see the messages above")


def run_again(count: int, arguments: list[str]) -> None:
    """Runs this file in `count` processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
    command = [*torchrun, "--nproc-per-node", str(count), __file__, *arguments]
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **os.environ}
    with subprocess.Popen(command, env=environment, stdout=sys.stderr) as process:
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends what it has started


def work(preset: str, sets: list[str], result: Path) -> None:
    """Trains in this process. The first one writes [tokens a second, share of a step that waits for data]."""
    config = run_settings(preset, sets)
    with ErrorCoordinator() as coordinator, StopRequest(), join(coordinator, config) as processes:
        found = measure(*build(config, random_data(config, processes), processes=processes))
        tokens = config.optim.batch_size * config.optim.grad_accum * config.model.seq_len
        if processes.first:
            result.write_text(json.dumps([tokens / found.seconds, found.waited]), encoding="utf-8")


if __name__ == "__main__":
    main()
