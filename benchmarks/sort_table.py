"""Trains the row Sort of ASEntmax's table of length generalisation, and scores it by length (docs/tasks.md).

    python benchmarks/sort_table.py runs/sort                          # as published: 312,500 steps, one run at a time
    python benchmarks/sort_table.py runs/sort --seconds 290 --jobs 9   # as many steps as fit, all runs share one GPU

Settings are those of deep-spin/asentmax, synthetic/configs/experiment/entmax/sort.yaml: two layers of width 256 with
eight heads of 32, a feed-forward of 1024 (theirs is a GeGLU), 32 symbols, batches of 128 with lengths from 32 to 64,
bf16, AdamW (0.9, 0.99) without weight decay, clipped at 1, the loss on the answer alone, a cosine after a warm-up of
6.4 % of the steps, and entmax with α = 1.5. Half of their heads have ALiBi, as `--position nape` has it; the other half
have no positions, as all have here by default. They name no learning rate: the paper takes the best of several, and of
three seeds.

With `--seconds` short runs measure the speed, which decides the number of steps; what still trains near the end is
stopped and scored as it is. Ctrl-C prints the table of what is scored. A run that was cut goes on with
the same command and `--steps`; one that is scored has its figures beside it, as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

from synthetic import half_width, header, row

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
# The exact match at 2 and 4 times the longest length of training: in the paper, the best of three seeds and several
# learning rates; and in a reproduction, of two seeds at the best learning rate, and at 4e-4.
PUBLISHED = {"softmax": ("0 and 0", "95 ± 4 and 3 ± 1; at 4e-4: 0 to 3 and 0"), "entmax": ("100 and 57.8", "–")}
LENGTHS = (64, 128, 256)
COMPILING_STEPS = 10
PROBE_STEPS = 250
STARTING_SECONDS = 20  # until all runs train, whose code the probes have compiled
SCORING_SECONDS = 30  # of all runs at once, with the start of a process
SHARE_OF_TIME = 0.9  # for which the steps are planned, because a speed changes


class Trial(NamedTuple):
    """A run: its arm, its learning rate and its seed."""

    name: str
    lr: float
    seed: int

    def __str__(self) -> str:
        return f"{self.name}, learning rate {self.lr:g}, seed {self.seed}"


class Jobs:
    """The commands that run, in sessions of their own, so that a Ctrl-C reaches them through this class alone."""

    def __init__(self) -> None:
        self._training: set[subprocess.Popen[str]] = set()
        self._scoring: set[subprocess.Popen[str]] = set()
        self.stopped = self._ended = False

    def train(self, *arguments: object) -> None:
        """Runs `cda train`, which `stop` may stop. Raises RuntimeError, with its stderr, if it fails."""
        if self.stopped:
            raise RuntimeError("no time was left to train it")
        self._run(self._training, "train", *arguments)

    def score(self, *arguments: object) -> Any:
        """Runs `cda eval` and returns its JSON. Raises RuntimeError, with its stderr, if it fails."""
        return json.loads(self._run(self._scoring, "eval", *arguments, "--json"))

    def _run(self, running: set[subprocess.Popen[str]], *arguments: object) -> str:
        if self._ended:
            raise RuntimeError("stopped")
        command = [sys.executable, "-m", "cda_cli", *map(str, arguments)]
        job = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        running.add(job)
        if self.stopped and running is self._training:  # `stop` has not seen it
            job.send_signal(signal.SIGINT)
        out, err = job.communicate()
        running.discard(job)
        if job.returncode and not (running is self._training and job.returncode == 128 + signal.SIGINT):
            raise RuntimeError(f"cda {arguments[0]} ended with {job.returncode}: {err.strip()[-2000:]}")
        return out

    def stop(self) -> None:
        """Asks what trains to save its checkpoint and stop, and lets nothing more train."""
        self.stopped = True
        for job in list(self._training):
            job.send_signal(signal.SIGINT)

    def end(self) -> None:
        """Stops all."""
        self._ended = True
        self.stop()
        for job in list(self._scoring):
            job.send_signal(signal.SIGINT)


def train(jobs: Jobs, run: Path, trial: Trial, steps: int, asked: argparse.Namespace) -> None:
    values = {f"model.{key}": value for key, value in MODEL.items()}
    values |= {f"optim.{key}": value for key, value in OPTIM.items()}
    values |= {"optim.lr": trial.lr, "optim.warmup_steps": round(WARMUP * steps)}
    values |= {"model.position": asked.position, "run.compile": str(asked.compile).lower(), "run.seed": trial.seed}
    values |= {"run.eval_every": 0, "run.save_every": 0, "run.save_minutes": 5}
    values["run.log_every"] = min(500, max(1, steps // 10))
    sets = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    jobs.train("--data", "task:sort", "--out", run, "--steps", steps, *ARMS[trial.name], *sets)


def records(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for line in lines if (record := json.loads(line))["kind"] == "train"]


def measure(jobs: Jobs, trial: Trial, steps: int, asked: argparse.Namespace) -> dict[str, Any] | None:
    """Trains a run, unless it is trained, and returns what `cda eval --json` says of it, with the step that was scored
    and the loss of the last record; or None, with a line on stderr, if that fails."""
    run = folder(trial, steps, asked.out)
    result = run.with_name(f"{run.name}.json")
    if result.exists():
        return cast(dict[str, Any], json.loads(result.read_text()))
    try:
        train(jobs, run, trial, steps, asked)
        lengths = ("--lengths", ",".join(map(str, LENGTHS)), "--limit", asked.num_examples, "--batch-size", 100)
        found = jobs.score(run, "--tasks", "task:sort", *lengths)
        loss = records(run)[-1]["loss"]
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        print(f"{trial}: {error}", file=sys.stderr, flush=True)
        return None
    found |= {"step": int(Path(found["checkpoint"]).name.removeprefix("step-")), "loss": loss}
    said = f"step {found['step']:,}, loss {loss:.4f}, exact match {shares(found, 'exact_match')}"
    print(f"{trial}: {said}", file=sys.stderr, flush=True)
    if found["step"] == steps:
        result.write_text(json.dumps(found, indent=2))
    return cast(dict[str, Any], found)


def folder(trial: Trial, steps: int, out: Path) -> Path:
    return out / re.sub("[^a-z0-9.]+", "-", f"{trial.name}-{trial.lr:g}-{steps}-{trial.seed}")


def steps_that_fit(jobs: Jobs, trials: list[Trial], asked: argparse.Namespace, deadline: float) -> int:
    """Measures the speed of as many runs at once as will train at once, and returns the steps that the time allows.

    One run of each arm comes first, by itself, and leaves its compiled code to the others.
    """
    at_once = trials[: asked.jobs]
    turns = math.ceil(len(trials) / asked.jobs)

    def compile_code(trial: Trial) -> None:
        train(jobs, folder(trial, COMPILING_STEPS, Path(probes)), trial, COMPILING_STEPS, asked)

    def seconds_a_step(trial: Trial) -> float:
        run = folder(trial, PROBE_STEPS, Path(probes))
        train(jobs, run, trial, PROBE_STEPS, asked)
        speed = statistics.median(record["tokens_per_second"] for record in records(run)[-4:])
        seconds = OPTIM["batch_size"] * MODEL["seq_len"] / speed  # type: ignore[operator]
        print(f"{trial}: {1000 * seconds:.1f} ms a step, beside the others", file=sys.stderr, flush=True)
        return seconds

    with tempfile.TemporaryDirectory(dir=asked.out) as probes, ThreadPoolExecutor(asked.jobs) as pool:
        try:
            if asked.compile:
                list(pool.map(compile_code, {trial.name: trial for trial in at_once}.values()))
            slowest = max(pool.map(seconds_a_step, at_once))
        except BaseException:
            jobs.end()
            raise
    left = deadline - time.monotonic() - turns * STARTING_SECONDS
    return max(10, int(SHARE_OF_TIME * left / turns / slowest) // 10 * 10)


def shares(found: dict[str, Any], metric: str) -> list[float]:
    """A metric at each length, in %."""
    return [round(100 * one["metrics"][f"{metric},none"], 2) for one in found["tasks"].values()]


def spread(values: list[float]) -> str:
    """The mean, and half the width of its 95 % interval over the seeds, with all values where they differ."""
    half = half_width(values)
    each = f" ({', '.join(f'{value:.1f}' for value in values)})" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):.1f}" + (f" ± {half:.1f}" if half is not None else "") + each


def table(found: dict[Trial, dict[str, Any] | None], asked: argparse.Namespace, steps: int) -> None:
    title = f"Sort in % by length, {steps:,} steps planned, positions: {asked.position}"
    columns = [f"{what}, {length}" for what in ("exact match", "tokens") for length in LENGTHS]
    header(
        title,
        "attention",
        "learning rate",
        "seeds",
        "steps",
        "loss",
        *columns,
        "paper, 128 and 256",
        "its reproduction",
    )
    for name, lr in itertools.product(asked.arms, asked.lr):
        scored = [one for seed in range(asked.seeds) if (one := found.get(Trial(name, lr, seed)))]
        if not scored:
            continue
        reached = sorted({one["step"] for one in scored})
        cells: list[object] = [f"{lr:g}", len(scored), ", ".join(f"{step:,}" for step in reached)]
        cells.append(f"{statistics.fmean(one['loss'] for one in scored):.4f}")
        for metric in ("exact_match", "token_accuracy"):
            cells += [spread(list(each)) for each in zip(*(shares(one, metric) for one in scored), strict=True)]
        row(name, *cells, *PUBLISHED.get(name, ("–", "–")))
    if any_scored := next(filter(None, found.values()), None):
        chance = [shares(any_scored, f"shuffled_{metric}") for metric in ("exact_match", "token_accuracy")]
        row("by chance", *"––––", *(f"{value:.1f}" for values in chance for value in values), "–", "–")


def main() -> None:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the runs")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--steps", type=int, default=312_500)
    parser.add_argument("--seconds", type=float, help="the time for all, which decides the steps in place of --steps")
    parser.add_argument("--lr", nargs="+", type=float, default=[4e-4], help="learning rates, each with all seeds")
    parser.add_argument("--position", choices=("none", "nape", "rotary"), default="none")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--num-examples", type=int, default=1000, help="of each length")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    for name, value in (("OMP_NUM_THREADS", "1"), ("TORCHINDUCTOR_COMPILE_THREADS", "4")):
        os.environ.setdefault(name, value)  # Several processes share the cores.

    jobs, steps = Jobs(), asked.steps
    found: dict[Trial, dict[str, Any] | None] = {}
    trials = [Trial(name, lr, seed) for seed in range(asked.seeds) for name in asked.arms for lr in asked.lr]
    with ThreadPoolExecutor(asked.jobs) as pool:
        try:
            deadline = started + asked.seconds - SCORING_SECONDS if asked.seconds else None
            if deadline:
                steps = steps_that_fit(jobs, trials, asked, deadline)
                print(f"{steps:,} steps each", file=sys.stderr, flush=True)
            scoring = {trial: pool.submit(measure, jobs, trial, steps, asked) for trial in trials}
            while not all(one.done() for one in scoring.values()):
                time.sleep(0.5)
                found |= {trial: one.result() for trial, one in scoring.items() if one.done()}
                if deadline and time.monotonic() > deadline and not jobs.stopped:
                    jobs.stop()
            found |= {trial: one.result() for trial, one in scoring.items()}
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            jobs.end()
        table(found, asked, steps)


if __name__ == "__main__":
    main()
