"""Tokens a second of one process and of several, a GPU each, through `cda train` itself.

    python benchmarks/distributed.py                      DDP and FSDP2 on two GPUs, preset base
    python benchmarks/distributed.py fsdp --devices 4

Each line is a run that is stopped after some steps (the saving is not part of the figure); the rate is the one that
the run shows, from its second step on. Two GPUs share the batch of one, so that a step has as many tokens in every run.
What follows `--` goes to `cda train`: `-- --preset tiny --device cpu` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parallel", nargs="*", default=["ddp", "fsdp"], help="ddp, fsdp")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    own, dashes, rest = sys.argv[1:], "--", ["--preset", "base"]
    if dashes in own:
        own, rest = own[: own.index(dashes)], own[own.index(dashes) + 1 :]
    options = parser.parse_args(own)
    print("| processes | tokens/s | × one | seconds, all |\n|---|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(prefix="cda-bench-") as folder:
        one = tokens_per_second("1", Path(folder), options.steps, rest)
        for parallel in options.parallel:
            several = ["--devices", str(options.devices), "--parallel", parallel]
            tokens_per_second(f"{options.devices}, {parallel}", Path(folder), options.steps, rest + several, one)


def tokens_per_second(name: str, folder: Path, steps: int, settings: list[str], one: float | None = None) -> float:
    """Of a run that is stopped once the line of figures of step `steps` has come; prints a row."""
    run, began = folder / name.replace(", ", "-"), time.perf_counter()
    never = ["--steps", "1000000", "--eval-every", "0", "--save-every", "0", "--set", "run.log_every=5"]
    command = [sys.executable, "-m", "cda_cli", "train", *settings, *never, "--out", str(run)]
    environment = {**os.environ, "CDA_CACHE": str(folder / "cache")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.lstrip().startswith(f"{steps}/"):
                process.send_signal(signal.SIGTERM)
    if process.returncode != 128 + signal.SIGTERM:
        sys.exit(f"the run of {name} ended with exit code {process.returncode}")
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    rate = {record["step"]: record["tokens_per_second"] for record in records if record["kind"] == "train"}[steps]
    print(f"| {name} | {rate:,.0f} | {rate / (one or rate):.2f} | {time.perf_counter() - began:.0f} |", flush=True)
    return float(rate)


if __name__ == "__main__":
    main()
