"""Trains the row Sort of ASEntmax's table of length generalisation, and scores it by length (docs/tasks.md).

    python benchmarks/sort_table.py runs/sort                                           # as published: 312,500 steps
    python benchmarks/sort_table.py runs/sort --steps 10000 --seeds 3 --jobs 9          # less of it, on one GPU

Settings are those of deep-spin/asentmax, synthetic/configs/experiment/entmax/sort.yaml: two layers of width 256 with
eight heads, batches of 128 with lengths from 32 to 64, AdamW with the loss on the answer alone, and a warm-up of 6.4 %
of the steps. The positions differ from theirs, half of whose heads have none while the others have ALiBi: `--position`
chooses none, or rotary ones. A run that was cut goes on with the same command, and one that is done and scored has its
figures beside it, as JSON. With several jobs a GPU is shared.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from synthetic import cda, half_width, header, row

MODEL = {
    "seq_len": 131, "dim": 256, "depth": 2, "heads": 8, "dim_head": 32, "ff": "swiglu", "ff_width": 1024,
    "ff_bias": "false", "norm": "rmsnorm", "qk_norm": "false", "tied_embeddings": "false", "logits_bias": "false",
    "learned_k": "false", "attn_eps": 1,
}  # fmt: skip
OPTIM = {"batch_size": 128, "beta2": 0.99, "weight_decay": 0, "clip": 1, "min_lr_ratio": 0}
WARMUP = 0.064  # of the steps
ARMS = {
    "softmax": ("--attention", "softmax"),
    "entmax": ("--attention", "entmax"),
    "soft top-k, k = 2": ("--attention", "coordinate-descent", "--attn-k", "2"),
}
# The exact match at 2 and 4 times the longest length of training, in the paper and in a reproduction of it.
PUBLISHED = {"softmax": ("0 and 0", "99 and 4"), "entmax": ("100 and 57.8", "–")}
LENGTHS = (64, 128, 256)


def measure(name: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm with one seed, unless it is trained, and returns what `cda eval --json` says of it."""
    run = asked.out / f"{re.sub('[^a-z0-9]+', '-', name)}-{asked.position}-{asked.steps}-{seed}"
    result = run.with_suffix(".json")
    if result.exists():
        return cast(dict[str, Any], json.loads(result.read_text()))
    values = {f"model.{key}": value for key, value in MODEL.items()}
    values |= {f"optim.{key}": value for key, value in OPTIM.items()}
    values |= {"optim.lr": asked.lr, "optim.warmup_steps": round(WARMUP * asked.steps)}
    values |= {"model.position": asked.position, "run.compile": str(asked.compile).lower(), "run.seed": seed}
    values |= {"run.eval_every": 0, "run.save_every": 0, "run.save_minutes": 5}
    values["run.log_every"] = min(500, max(1, asked.steps // 10))
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    cda("train", "--data", "task:sort", "--out", run, "--steps", asked.steps, *ARMS[name], *sets)
    lengths = ("--lengths", ",".join(map(str, LENGTHS)), "--limit", asked.num_examples, "--batch-size", 100)
    found = json.loads(cda("eval", run, "--tasks", "task:sort", *lengths, "--json"))
    print(f"{name}, seed {seed}: {shares(found, 'exact_match')}", file=sys.stderr, flush=True)
    result.write_text(json.dumps(found, indent=2))
    return cast(dict[str, Any], found)


def shares(found: dict[str, Any], metric: str) -> list[float]:
    """A metric at each length, in %."""
    return [100 * one["metrics"][f"{metric},none"] for one in found["tasks"].values()]


def spread(values: list[float]) -> str:
    """The mean, and half the width of its 95 % interval over the seeds."""
    half = half_width(values)
    return f"{statistics.fmean(values):.1f}" + (f" ± {half:.1f}" if half is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the runs")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=312_500)
    parser.add_argument("--lr", type=float, default=4e-4)
    parser.add_argument("--position", choices=("none", "rotary"), default="none")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--num-examples", type=int, default=1000, help="of each length")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)

    pairs = [(name, seed) for seed in range(asked.seeds) for name in asked.arms]
    with ThreadPoolExecutor(asked.jobs) as pool:
        found = dict(zip(pairs, pool.map(lambda pair: measure(pair[0], pair[1], asked), pairs), strict=True))

    title = f"Sort in % by length, {asked.steps:,} steps, positions: {asked.position}, seeds: {asked.seeds}"
    columns = [f"{what}, {length}" for what in ("exact match", "tokens") for length in LENGTHS]
    header(title, "attention", *columns, "paper, 128 and 256", "its reproduction")
    for name in asked.arms:
        cells = []
        for metric in ("exact_match", "token_accuracy"):
            by_seed = [shares(found[name, seed], metric) for seed in range(asked.seeds)]
            cells += [spread(list(values)) for values in zip(*by_seed, strict=True)]
        row(name, *cells, *PUBLISHED.get(name, ("–", "–")))
    chance = [shares(found[pairs[0]], f"shuffled_{metric}") for metric in ("exact_match", "token_accuracy")]
    row("by chance", *(f"{value:.1f}" for values in chance for value in values), "–", "–")


if __name__ == "__main__":
    main()
