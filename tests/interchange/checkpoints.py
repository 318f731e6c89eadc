"""Checkpoints of tiny models without training: weights so large that each part of the model shows in the logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cda_cli.config import parse
from cda_cli.model import state_tensors
from cda_cli.storage import publish
from tests.model.cases import TINY, build

STEP, STEPS = 3, 10


def save_checkpoint(
    run: Path, *, tokenizer_json: str | None = None, averaged: bool = False, vocab_size: int = 256, **model: Any
) -> Path:
    """Saves step 3 of 10 of a run with the settings `model`, and returns the folder of the checkpoint."""
    settings = {**TINY, "seq_len": 24, "vocab_size": vocab_size, **model}
    config = parse({"model": settings, "optim": {"steps": STEPS, "warmup_steps": 1}})
    state = {"step": STEP, "tokens": 99, "position": None, "optimizer": {}, "config": config.model_dump()}
    return publish(
        run,
        step=STEP,
        model=state_tensors(build(config.model)),
        ema=state_tensors(build(config.model, seed=7)) if averaged else None,
        optimizer={"none": torch.zeros(1)},
        rng={"none": torch.zeros(1)},
        state=state,
        tokenizer_json=tokenizer_json,
    )
