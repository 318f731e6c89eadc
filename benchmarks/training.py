"""Measures training as in `cda train`, beside nanoGPT's step: speed, memory, FLOPs utilisation, and the cost of saving.

    python benchmarks/training.py
    python benchmarks/training.py small bytes-8192

`CASES` are presets with GPT-2's vocabulary and their own batches, unless something else is set, compiled, in bf16. With
the presets' own vocabulary of bytes, attention is a larger part of a step. Next to nanoGPT's step is that of a model
with nanoGPT's parts: learned positions, LayerNorm, and no norm of queries and keys. The times of `cda` are those of its
loop on a wall clock, from one log line to the next, with one such line. Memory is the most that PyTorch's allocator had
given out at once in such steps, without the log line. It is not measured with CUDA graphs, whose memory is allocated
beforehand. Reserved is what the allocator holds of the GPU at the end.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import nanogpt
import torch
from synthetic import ATTENTION, SOFTMAX, header, on_gpu, random_data, row, settings

from cda_cli.config import Config
from cda_cli.errors import InterruptedRunError
from cda_cli.runs.early_stop import Patience
from cda_cli.runs.folder import Run
from cda_cli.runs.metrics import Metrics
from cda_cli.runs.records import Record, TrainRecord
from cda_cli.runtime import peak_memory
from cda_cli.signals import StopRequest
from cda_cli.training.accounting.flops import flops_per_token, peak_flops
from cda_cli.training.display import NullDisplay
from cda_cli.training.loop import save, train
from cda_cli.training.pipeline import draw, inspect_first
from cda_cli.training.setup import build
from cda_cli.training.state import RunContext, TrainState

WARM = 5
SINGLY = ", no CUDA graphs"
BYTES = "model.vocab_size=257"
GPT2 = ("model.position=learned", "model.norm=layernorm", "model.qk_norm=false")


class Case(NamedTuple):
    """A preset, and what is set in it. `beside` also measures nanoGPT's step, that of its parts, and saving."""

    preset: str
    sets: tuple[str, ...] = ()
    beside: bool = False


def filling(sequence: float) -> int:
    """Returns a batch size, a multiple of 128, that takes four fifths of this GPU, from the bytes of a sequence."""
    total = torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else 0
    return max(128, int(0.8 * total / sequence) // 128 * 128)


SEED = f"optim.batch_size={filling(80 * 2**20)}"
LONG = ("model.seq_len=8192", "optim.batch_size=4", "optim.grad_accum=1")
CASES = {
    "tiny": Case("tiny", (BYTES, "run.log_every=200")),
    # It has the vocabulary of bytes, as published. Ten of its steps take as long as a hundred of `small`.
    "seed": Case("seed", (BYTES, "model.solver=exact", SEED, "optim.grad_accum=1", "run.log_every=10")),
    "small": Case("small", beside=True),
    "small-50257": Case("small", ("model.vocab_size=50257",)),  # GPT-2's own number of tokens
    "small-8192": Case("small", LONG),
    "bytes-1024": Case("small", (BYTES,)),
    "bytes-8192": Case("small", (BYTES, *LONG)),
    "base": Case("base", ("run.log_every=30",), beside=True),
}


class Clock(NullDisplay):
    """A display that shows nothing, and records the time of each step.

    It also keeps the first log line after the warm steps, which is that of step `last` - WARM, and the peak of memory
    before it. It stops the run after step `last`, since a run that ends by itself is validated, which compiles again.
    """

    def __init__(self, last: int, device: torch.device) -> None:
        self.last, self.device = last, device
        self.memory = 0
        self.times: dict[int, float] = {}
        self.record: TrainRecord | None = None

    def advance(self, step: int, seconds_left: float | None) -> None:
        self.times[step] = time.perf_counter()
        if step == WARM and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if step < self.last - WARM:
            self.memory = peak_memory(self.device)
        if step == self.last:
            os.kill(os.getpid(), signal.SIGINT)

    def show(self, record: Record) -> None:
        if isinstance(record, TrainRecord) and record.step > WARM and not self.record:
            self.record = record


class Measured(NamedTuple):
    """What is measured of a step.

    `seconds` are those of a step. `memory` is its peak in bytes, unless CUDA graphs hold it. `waited` is the share of a
    step spent waiting for data. `saving` are the seconds of a save.
    """

    seconds: float
    memory: int | None
    waited: float | None = None
    saving: float | None = None


def measure(context: RunContext, state: TrainState) -> Measured:
    steps = context.config.run.log_every
    clock = Clock(WARM + steps, context.device)
    inspect_first(context, state, draw(state, 1)[0])  # compiles kernels too
    with tempfile.TemporaryDirectory() as folder, StopRequest() as stop:
        metrics = Metrics(Path(folder) / "metrics.jsonl", 0)
        with contextlib.suppress(InterruptedRunError):
            train(context, state, Run(Path(folder)), metrics, clock, context.processes.agreed(stop), Patience(0))
        metrics.close()
    seconds = (clock.times[WARM + steps] - clock.times[WARM]) / steps
    return Measured(seconds, None if context.graphs else clock.memory, clock.record.data_wait if clock.record else None)


def measure_nanogpt(config: Config, device: torch.device) -> Measured:
    batches = random_data(config).open_batches(None)

    def two_tensors() -> tuple[torch.Tensor, torch.Tensor]:
        batch, _ = next(batches)
        return batch.inputs, batch.targets

    return Measured(*nanogpt.measure(config, two_tensors, device, WARM, config.run.log_every))


def saving(context: RunContext, state: TrainState) -> float:
    """Returns the seconds of a save with checkpoints to prune: the median of three saves after two others."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for step in range(5):
            state.step = step
            began = time.perf_counter()
            save(context, state, Run(Path(folder)))
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def run_settings(preset: str, sets: Sequence[str]) -> Config:
    quiet = ["run.eval_every=0", "run.save_every=0", "run.eval_batches=1"]
    steps = WARM + settings(preset, sets).run.log_every + 1  # it is stopped before the last
    return settings(preset, [*quiet, f"optim.steps={steps}", "optim.warmup_steps=10", *sets])


def rows(case: Case, device: torch.device) -> Iterator[tuple[str, Config, Measured]]:
    """Measures the steps of a case, each built once, and yields them with their names."""
    if case.beside:
        _free()
        config = run_settings(case.preset, [*case.sets, *SOFTMAX])
        yield "nanoGPT", config, measure_nanogpt(config, device)
        yield "softmax, parts of GPT-2", *whole_loop(case, [*SOFTMAX, *GPT2])
    for name, sets in ATTENTION.items():
        yield name, *whole_loop(case, sets, saves=case.beside and name == "softmax")
        yield name + SINGLY, *whole_loop(case, [*sets, "run.cuda_graphs=false"])


def whole_loop(case: Case, sets: Sequence[str], saves: bool = False) -> tuple[Config, Measured]:
    _free()
    config = run_settings(case.preset, [*case.sets, *sets])
    context, state = build(config, random_data(config))
    found = measure(context, state)
    return config, found._replace(saving=saving(context, state)) if saves else found


def tables(cases: Sequence[Case], device: torch.device) -> None:
    header("Training, bf16, compiled", "preset, vocabulary, T, batch", "step", "tokens/s", "× nanoGPT", "× softmax",
           "memory, GiB", "reserved, GiB", "MFU computed", "MFU dense", "waiting for data")  # fmt: skip
    peak, backend = peak_flops(device, torch.bfloat16), "triton" if device.type == "cuda" else "torch"
    saves = []
    for case in cases:
        seconds: dict[str, float] = {}
        for name, config, found in rows(case, device):
            model, optim = config.model, config.optim
            seconds[name] = found.seconds
            speed = optim.batch_size * optim.grad_accum * model.seq_len / found.seconds
            softmax = "softmax" + SINGLY * name.endswith(SINGLY)
            batch = f"{optim.batch_size} × {optim.grad_accum}" if optim.grad_accum > 1 else optim.batch_size
            row(
                f"{case.preset}, {model.vocab_size}, {model.seq_len}, {batch}",
                name,
                f"{speed / 1e3:.1f} k",
                *(f"{seconds[one] / found.seconds:.2f}" if one in seconds else "–" for one in ("nanoGPT", softmax)),
                "–" if found.memory is None else f"{found.memory / 2**30:.2f}",
                f"{torch.cuda.memory_reserved() / 2**30:.2f}",
                *(
                    f"{speed * flops / peak:.1%}" if peak else "–"
                    for flops in flops_per_token(config, backend, device, torch.bfloat16)
                ),
                "–" if found.waited is None else f"{found.waited:.2%}",
            )
            if found.saving is not None:
                saves.append((case.preset, found.saving, found.seconds, settings(case.preset).run.save_every))
    if saves:
        header("Saving at the default interval", "preset", "seconds", "steps between", "share of the time")
    for preset, saved, step, every in saves:
        row(preset, f"{saved:.2f}", every, f"{saved / (every * step):.2%}")


def _free() -> None:
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()  # those of graphs' streams would count as memory of the next row
        torch.cuda.empty_cache()


def main(wanted: Sequence[str]) -> None:
    names = on_gpu(wanted, CASES)
    began = time.perf_counter()
    tables([CASES[name] for name in names], torch.device("cuda"))
    print(f"\n{time.perf_counter() - began:.0f} s for all")


if __name__ == "__main__":
    main(sys.argv[1:])
