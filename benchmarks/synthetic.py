"""Random tokens in place of a text, so that a benchmark needs no data; what the benchmarks on a GPU ask for, and their
tables."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cda_cli.config import Config, resolve
from cda_cli.data import Tokens, TrainBatches, load_tokenizer
from cda_cli.training.setup import RunData

VOCABULARY = 50304  # GPT-2's, rounded up to a multiple of 64
TOKENS = 2**22
SOFTMAX = ("model.attention=softmax", "model.learned_k=false")
ATTENTION = {"softmax": SOFTMAX, "coordinate-descent": ()}


def settings(preset: str, sets: Sequence[str] = ()) -> Config:
    """A preset with GPT-2's vocabulary."""
    return resolve(preset=preset, sets=[f"model.vocab_size={VOCABULARY}", *sets])


def on_gpu(wanted: Sequence[str] = (), known: Collection[str] = ()) -> list[str]:
    """What to measure of all that is `known`: what is wanted, or everything. Ends the program where a name is unknown,
    or where there is no GPU."""
    program = f"benchmarks/{Path(sys.argv[0]).name}"
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"{program} has no {', '.join(unknown)}; it has {', '.join(known)}")
    if not torch.cuda.is_available():
        sys.exit(f"{program} measures on a CUDA device, and there is none")
    return [name for name in known if not wanted or name in wanted]


def random_data(config: Config) -> RunData:
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, TOKENS, dtype=np.uint16)
    tokens = Tokens(ids, np.full(TOKENS, 4, np.uint8), text_bytes=4 * TOKENS)
    seq_len, batch_size = config.model.seq_len, config.optim.batch_size

    def open_batches(position: Any) -> TrainBatches:
        return TrainBatches(tokens, seq_len, batch_size, 0, position)

    return RunData(load_tokenizer("bytes"), tokens, "random tokens", TOKENS // seq_len, None, open_batches)


def row(*cells: object) -> None:
    """A line of a table; numbers with three decimals."""
    print(
        "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |", flush=True
    )


def header(title: str, *columns: str) -> None:
    print(f"\n{title}\n", flush=True)
    row(*columns)
    print("|---|" + "---:|" * (len(columns) - 1), flush=True)
