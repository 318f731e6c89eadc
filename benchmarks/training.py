"""Training as `cda train` does it, beside nanoGPT's step: tokens a second, FLOPs utilisation, and what saving costs.

    python benchmarks/training.py [small] [base]

Presets with GPT-2's vocabulary and their own batches, bf16, compiled. `cda`'s figures are those of its whole loop on a
wall clock, over as many steps as lie between two lines of figures, with one such line. `cudnn` is the softmax model
with cuDNN's attention in place of the one that PyTorch prefers.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import nanogpt
import torch
from synthetic import ATTENTION, SOFTMAX, header, random_data, row, settings
from torch.nn.attention import SDPBackend, sdpa_kernel

from cda_cli.config import Config
from cda_cli.errors import InterruptedRunError
from cda_cli.signals import StopRequest
from cda_cli.storage import publish
from cda_cli.training.flops import flops_per_token, peak_flops
from cda_cli.training.loop import layer_figures, next_batch, train
from cda_cli.training.milestones import Patience
from cda_cli.training.run_folder import Metrics
from cda_cli.training.setup import Setup, build

PRESETS = ("small", "base")
WARM = 5


class Clock:
    """A display that shows nothing, and knows when each step was done, and what the last line of figures was.

    It stops the run after step `last`: a run that comes to its own end is validated, which compiles once more.
    """

    interactive = False

    def __init__(self, last: int) -> None:
        self.last = last
        self.times: dict[int, float] = {}
        self.figures: dict[str, Any] = {}

    def start(self, plan: Any) -> None: ...

    def advance(self, step: int) -> None:
        self.times[step] = time.perf_counter()
        if step == self.last:
            os.kill(os.getpid(), signal.SIGINT)

    def show(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            self.figures = record

    def note(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Measured(NamedTuple):
    """`seconds` of a step; `waited`, the share of it that went into waiting for data."""

    seconds: float
    waited: float


def measure(setup: Setup) -> Measured:
    steps = setup.config.run.log_every
    clock = Clock(WARM + steps)
    layer_figures(setup, next_batch(setup))  # compiles kernels too
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        metrics = Metrics(Path(folder) / "metrics.jsonl", 0)
        with contextlib.suppress(InterruptedRunError):
            train(setup, Path(folder), metrics, clock, setup.processes.agreed(stop), Patience(0))
        metrics.close()
    return Measured((clock.times[WARM + steps] - clock.times[WARM]) / steps, clock.figures["data_wait"])


def saving(setup: Setup) -> float:
    """Seconds of a save once there are checkpoints to prune: the median of three after two."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(5):
            setup.step = step
            began = time.perf_counter()
            publish(Path(folder), **setup.publishable())
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def run_settings(preset: str, sets: Sequence[str]) -> Config:
    quiet = ["run.eval_every=0", "run.save_every=0", "run.eval_batches=1"]
    steps = WARM + settings(preset, sets).run.log_every + 1  # it is stopped before the last
    return settings(preset, [*quiet, f"optim.steps={steps}", "optim.warmup_steps=10", *sets])


def speed_table(presets: Sequence[str], device: torch.device) -> None:
    header("Training, bf16, compiled", "preset", "step", "tokens/s", "× nanoGPT", "MFU computed", "MFU dense",
           "waiting for data")  # fmt: skip
    peak = peak_flops(device, torch.bfloat16)
    costs = []

    def utilisation(config: Config, speed: float) -> list[str]:
        backend = "triton" if device.type == "cuda" else "torch"
        return [f"{speed * flops / peak:.1%}" if peak else "–" for flops in flops_per_token(config, backend)]

    for preset in presets:
        config = run_settings(preset, SOFTMAX)
        batches = random_data(config).open_batches(None)

        def two_tensors(batches: Any = batches) -> tuple[torch.Tensor, torch.Tensor]:
            batch, _ = next(batches)
            return batch.inputs, batch.targets

        beside = nanogpt.tokens_per_second(config, two_tensors, device, WARM, config.run.log_every)
        row(preset, "nanoGPT", f"{beside / 1e3:.1f} k", "1.00", *utilisation(config, beside), "–")
        for name, sets in {**ATTENTION, "softmax, cudnn": SOFTMAX}.items():
            _free()
            config = run_settings(preset, sets)
            setup = build(config, random_data(config))
            first = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
            with sdpa_kernel(first, set_priority=True) if "cudnn" in name else contextlib.nullcontext():
                found = measure(setup)
            speed = config.optim.batch_size * config.optim.grad_accum * config.model.seq_len / found.seconds
            row(preset, name, f"{speed / 1e3:.1f} k", f"{speed / beside:.2f}", *utilisation(config, speed),
                f"{found.waited:.2%}")  # fmt: skip
            if name == "softmax":
                costs.append((preset, saving(setup), found.seconds, settings(preset).run.save_every))
            del setup
        _free()
    header("Saving at the default interval", "preset", "seconds", "steps between", "share of the time")
    for preset, seconds, step, every in costs:
        row(preset, f"{seconds:.2f}", every, f"{seconds / (every * step):.2%}")


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(wanted: Sequence[str]) -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks/training.py measures on a CUDA device, and there is none")
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}", flush=True)
    speed_table(wanted or PRESETS, torch.device("cuda"))


if __name__ == "__main__":
    main(sys.argv[1:])
