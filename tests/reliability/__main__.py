"""All experiments with their full counts: `python -m tests.reliability`, or `make reliability`.

Prints progress, writes the table of docs/reliability.md, and exits with 1 where a promise did not hold. Names of
experiments as arguments run those alone, and write nothing.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

import cda_cli
import tests.conftest  # noqa: F401 - one thread each, before torch is imported
from tests.reliability.experiments import EXPERIMENTS, run_in_full
from tests.reliability.harness import Sum, upper_bound

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- written by make reliability -->\n", "<!-- end -->\n"
WORKERS = 2


def table(sums: dict[str, Sum], seed: int, minutes: float) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "datasets"))
    python = ".".join(map(str, sys.version_info[:3]))
    lines = [
        f"Seed {seed}, {datetime.date.today().isoformat()}, cda {cda_cli.__version__}, Python {python}, {versions}; "
        f"{minutes:.0f} minutes on {WORKERS} CPU cores.",
        "",
        "| promise | experiment | tried | failed | 95 % bound | broken variants |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, experiment in EXPERIMENTS.items():
        total = sums[name]
        lines.append(
            f"| {experiment.promise} | {name} | {total.tried:,} | {total.failed} | "
            f"{upper_bound(total.tried, total.failed):.2%} | {len(experiment.variants)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *EXPERIMENTS], metavar="EXPERIMENT")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = given.names or list(EXPERIMENTS)
    print(f"seed {given.seed}: {', '.join(names)}", flush=True)
    began, sums = time.monotonic(), {}
    # The longest first, so that no core waits for them at the end.
    longest = ["cuts", "chains", "signals", "not finite", "damage"]
    order = sorted(names, key=lambda name: longest.index(name) if name in longest else len(longest))
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run_in_full, name, given.seed) for name in order]):
            name, total, seconds = future.result()
            sums[name] = total
            print(f"{name}: {total.tried} tried, {total.failed} failed, in {seconds:.0f} s", flush=True)
    if not given.names:
        text = table(sums, given.seed, (time.monotonic() - began) / 60)
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.split(END)[1], encoding="utf-8")
        print(f"\n{text}")
    sys.exit(any(total.failed for total in sums.values()))


if __name__ == "__main__":
    main()
