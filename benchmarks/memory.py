"""Compares the forecast of memory with the measured peak of two training steps on this GPU.

The peak is the most bytes that PyTorch's allocator had given out at once (`torch.cuda.max_memory_allocated`). It
contains neither the allocator's reserve nor CUDA itself.

    python benchmarks/memory.py

The cases are the presets tiny, small and base with GPT-2's vocabulary, with both kinds of attention, with and without
torch.compile (and CUDA graphs) and activation checkpointing. Each case has a process of its own, and several run at a
time. All take about two minutes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from typing import NamedTuple

import torch
from synthetic import ATTENTION, header, on_gpu, random_data, row, settings

from cda_cli.training.accounting.memory_forecast import forecast
from cda_cli.training.distributed.processes import ALONE
from cda_cli.training.run import try_steps
from cda_cli.training.setup import build, resolve_backend, uses_cuda_graphs

PRESETS = ("tiny", "small", "base")
BATCH = 8  # small enough for a few of the largest cases at a time
AT_A_TIME = 6


class Case(NamedTuple):
    preset: str
    attention: str
    compiled: bool
    checkpointing: bool


class Outcome(NamedTuple):
    """Bytes, and the seconds that the forecast took."""

    forecast: int
    measured: int
    seconds: float


def outcome(case: Case) -> Outcome:
    config = settings(
        case.preset,
        [
            *ATTENTION[case.attention],
            f"optim.batch_size={BATCH}",
            f"run.compile={case.compiled}",
            f"run.activation_checkpointing={case.checkpointing}",
            "run.device=cuda",
        ],
    )
    device = torch.device("cuda")
    began = time.perf_counter()
    backend = resolve_backend(config, device)
    captured = uses_cuda_graphs(config, backend, device, case.compiled, ALONE, print)
    expected = forecast(config, device, torch.bfloat16, case.compiled, captured, backend)
    seconds = time.perf_counter() - began
    return Outcome(expected.peak, try_steps(*build(config, random_data(config)))[1], seconds)


def main() -> None:
    on_gpu()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    began = time.perf_counter()
    # Compiled cases take longest, so they start first.
    cases = [
        Case(preset, attention, compiled, checkpointing)
        for compiled, preset, attention, checkpointing in itertools.product(
            (True, False), reversed(PRESETS), ATTENTION, (False, True)
        )
    ]
    header(
        f"Memory of a training step, batch {BATCH}, bf16, MiB",
        "preset, attention", "compiled", "checkpointing", "forecast", "allocated", "ratio", "forecast took",
    )  # fmt: skip
    outcomes = []
    with multiprocessing.get_context("spawn").Pool(AT_A_TIME, maxtasksperchild=1) as pool:
        for case, found in zip(cases, pool.imap(outcome, cases), strict=True):
            outcomes.append(found)
            row(
                f"{case.preset}, {case.attention}",
                "yes" if case.compiled else "no",
                "yes" if case.checkpointing else "no",
                f"{found.forecast / 2**20:.0f}",
                f"{found.measured / 2**20:.0f}",
                f"{found.forecast / found.measured:.3f}",
                f"{found.seconds:.1f} s",
            )
    ratios = [found.forecast / found.measured for found in outcomes]
    print(f"\nratios from {min(ratios):.3f} to {max(ratios):.3f}; {time.perf_counter() - began:.0f} s for all")


if __name__ == "__main__":
    main()
