"""Fine-tunes one model with soft top-k and with controls, and measures each with fewer keys (docs/sparsify.md).

    cda import SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2 --seq-len 1024
    python benchmarks/sparsify.py runs/smollm2 runs/sparsify --data stdlib --steps 100 --jobs 3

Every arm starts from the weights of the run and takes the same steps on the same text, with the same seeds. Its ε falls
from 1, which is softmax, to 0.5 over the first half of the steps, or where it is late over the last fifth; entmax keeps
ε = 1, and many times the memory. A gate is the control of a learned k. A run that was cut goes on, and one that is done
and evaluated has its figures beside it, as JSON. With several jobs a GPU is shared.
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

SHARPER = ("--set", "model.attn_eps=0.5", "--set", "model.eps_anneal_start=1.0")
LATE = ("--set", "model.eps_anneal_begin=0.8", "--set", "model.eps_anneal_share=1")
LEARNED = ("--attention", "coordinate-descent", "--attn-k", "4", "--learned-k", "--set", "model.learned_k_bias=-4")
# Of the form of that learned k, so that it begins near 1: weights that knew no gate need that.
GATE = ("--set", "model.output_gate=true", "--set", "model.output_gate_max=4", "--set", "model.learned_k_bias=-4")
ARMS: dict[str, tuple[str, ...]] = {
    "softmax": ("--attention", "softmax"),
    "tempered softmax": ("--attention", "tempered-softmax", *SHARPER),
    "tempered softmax, gate": ("--attention", "tempered-softmax", *GATE, *SHARPER),
    "soft top-k, k = 2": (
        "--attention", "coordinate-descent", "--attn-k", "2", "--set", "model.normalise=k", *SHARPER,
    ),
    "soft top-k, k learned up to 4": (*LEARNED, *SHARPER),
    "soft top-k, k learned up to 4, late": (*LEARNED, *SHARPER, *LATE),
    "entmax, gate": ("--attention", "entmax", *GATE),
}  # fmt: skip
MEASURED = ("softmax", "tempered softmax", "soft top-k, k = 2", "soft top-k, k learned up to 4")  # in docs/sparsify.md
CUTS = ("top:64", "top:32", "top:16", "top:8", "recent:64", "sink:64", "random:64")


def measure(source: Path, out: Path, name: str, seed: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm with one seed, unless it is trained, and returns what `cda eval --json` says of it."""
    run = out / f"{re.sub('[^a-z0-9]+', '-', name)}-{seed}"
    result = run.with_suffix(".json")
    if result.exists():
        return cast(dict[str, Any], json.loads(result.read_text()))
    if (run / "checkpoints").is_dir():
        cda("train", "--resume", run)
    else:
        optim = ("--steps", asked.steps, "--batch-size", asked.batch_size, "--grad-accum", asked.grad_accum)
        rate = ("--lr", asked.lr, "--set", f"optim.warmup_steps={asked.steps // 10}", "--set", "optim.weight_decay=0")
        quiet = ("--set", "run.eval_every=0", "--set", "run.save_every=0")
        eager = ("--set", "run.compile=false")  # Compiling takes longer than so few steps.
        start = ("train", "--init-from", source, "--data", asked.data, "--out", run, "--set", f"run.seed={seed}")
        cda(*start, *optim, *rate, *quiet, *eager, *ARMS[name])
    cuts = [argument for cut in CUTS for argument in ("--cut", cut)]
    found = json.loads(cda("eval", run, *cuts, "--max-batches", asked.max_batches, "--json"))
    print(f"{name}, seed {seed}: {found['bits_per_byte']:.4f} bits per byte", file=sys.stderr, flush=True)
    result.write_text(json.dumps(found))
    return cast(dict[str, Any], found)


def spread(values: list[float], signed: bool = False) -> str:
    """The mean, and half the width of its 95 % interval over the seeds."""
    mean, half = statistics.fmean(values), half_width(values)
    words = f"{mean:+.4f}" if signed else f"{mean:.4f}"
    return words if half is None else f"{words} ± {half:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the run that all start from")
    parser.add_argument("out", type=Path, help="a folder for the runs")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--grad-accum", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-batches", type=int, default=4, help="batches of 16 windows to evaluate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=MEASURED, help="the first is the control")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)

    before = json.loads(cda("eval", asked.source, "--data", asked.data, "--split", "validation",
                            "--max-batches", asked.max_batches, "--json"))  # fmt: skip
    pairs = [(name, seed) for seed in range(asked.seeds) for name in asked.arms]
    with ThreadPoolExecutor(asked.jobs) as pool:
        results = list(pool.map(lambda pair: measure(asked.source, asked.out, pair[0], pair[1], asked), pairs))
    found = dict(zip(pairs, results, strict=True))

    header("Bits per byte, and how much more with fewer keys", "arm", "all keys", "− softmax", *CUTS)
    row("not fine-tuned", f"{before['bits_per_byte']:.4f}", "–", *("–" for _ in CUTS))
    for name in asked.arms:
        mine = [found[name, seed] for seed in range(asked.seeds)]
        whole = [one["bits_per_byte"] for one in mine]
        control = [found[asked.arms[0], seed]["bits_per_byte"] for seed in range(asked.seeds)]
        against = [a - b for a, b in zip(whole, control, strict=True)]
        cut = [[one["cuts"][place]["difference"] for one in mine] for place in range(len(CUTS))]
        row(name, spread(whole), spread(against, True), *(spread(each, True) for each in cut))


if __name__ == "__main__":
    main()
