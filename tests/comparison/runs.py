"""Folders of runs as training would leave them, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cda_cli.config import resolve
from cda_cli.runs.folder import Run
from cda_cli.storage import publish
from tests.runs.records import TRAIN, VALIDATION


def write_run(
    path: Path,
    bits: Sequence[float] = (8.0, 6.0, 5.0, 4.5),
    *,
    flags: Mapping[str, Any] | None = None,
    tokens_per_step: int = 100,
    tokens_per_second: float = 1000.0,
    validated: bool = True,
    averaged: float | None = None,
    active_blocks: float | None = None,
    text: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a run with a record every 10 steps, of these `bits` per byte; with `text`, its checkpoint tells that.

    The loss of its averaged weights is lower by `averaged`.
    """
    path.mkdir(parents=True)
    run = Run(path)
    run.write_config(resolve("tiny", flags={"optim.steps": 10 * max(1, len(bits)), **(flags or {})}))
    metrics = run.open_metrics(0)
    train = replace(TRAIN, layers=tuple(replace(layer, active_blocks=active_blocks) for layer in TRAIN.layers))
    for number, value in enumerate(bits, start=1):
        step = 10 * number
        tokens = tokens_per_step * step
        metrics.write(
            replace(train, step=step, tokens=tokens, bits_per_byte=value, tokens_per_second=tokens_per_second)
        )
        if validated:
            ema = None if averaged is None else value - averaged
            metrics.write(replace(VALIDATION, step=step, loss=value, bits_per_byte=value, ema_loss=ema))
    metrics.close()
    if text is not None:
        publish(path, step=10 * len(bits), model={}, optimizer={}, rng={}, state={"data": dict(text)})
    return path
