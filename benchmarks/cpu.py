"""Measures speed on this CPU: of start-up, and of a training step with softmax, the exact and the published soft top-k.

    make bench

Each table is one run. The steps of all variants are interleaved, so that a busy machine disturbs them alike, and the
table has their medians. The model is preset tiny (T = 256) on the source of the standard library. "trained" repeats the
measurement after 150 steps with that attention, since the work of the solver depends on the scores.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from synthetic import header, row

from cda_cli.config import Config, resolve
from cda_cli.data import Batch, TrainBatches, prepare
from cda_cli.model import Transformer
from cda_cli.training.gradients import accumulate_gradients, clip_gradients
from cda_cli.training.optimizer import build_optimizer

CPU = torch.device("cpu")
ROUNDS = 12
TRAINING_STEPS = 150
PUBLISHED_ITERATIONS = 25
VARIANTS = {
    "softmax (PyTorch SDPA)": ["model.attention=softmax", "model.learned_k=false"],
    "exact soft top-k, k = 2, learned": [],
    "exact soft top-k, k = 8": ["model.attn_k=8", "model.learned_k=false"],
    "published operator, 25 iterations": [
        "model.solver=iterative",
        f"model.n_iters={PUBLISHED_ITERATIONS}",
        "run.backend=colt5",
        "model.learned_k=false",
    ],
}


def main() -> None:
    print(f"`cda --help`: {start_up():.2f} s (median of 5)")
    corpus = prepare(resolve().data, show_progress=False)
    for trained in (False, True):
        stepper = {
            name: make_step(resolve(sets=sets), corpus.train, trained and "published" not in name)
            for name, sets in VARIANTS.items()
        }
        times = interleaved(stepper)
        softmax = times["softmax (PyTorch SDPA)"]
        title = f"after {TRAINING_STEPS} steps" if trained else "fresh weights"
        header(f"A training step, preset tiny, T = 256, batch 8, {title}", "attention", "ms", "× softmax")
        for name, seconds in times.items():
            row(name, f"{seconds * 1e3:.0f}", f"{seconds / softmax:.2f}")


def start_up() -> float:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cda_cli", "--help"], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def make_step(config: Config, tokens: object, trained: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    model = Transformer(config.model, config.run.backend)
    optimizer = build_optimizer(model, config.optim)
    stream = TrainBatches(tokens, config.model.seq_len, config.optim.batch_size, seed=0)  # type: ignore[arg-type]
    batches: Iterator[Batch] = (batch for batch, _ in stream)

    def step() -> None:
        accumulate_gradients(model, [next(batches)], CPU, torch.float32)
        clip_gradients(model, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(TRAINING_STEPS if trained else 2):
        step()
    return step


def interleaved(steps: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Returns the median seconds of each; the published operator is timed a quarter as often."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(ROUNDS):
        for name, step in steps.items():
            if "published" in name and index % 4:
                continue
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
