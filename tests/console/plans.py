"""The plan of a run that the tests show, and its records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cda_cli.config import Config
from cda_cli.console.run_status import RunStatus
from cda_cli.runs.records import Record
from cda_cli.training.display import Plan
from tests.runs.records import LAYER, TRAIN, VALIDATION

PLAN = Plan(
    run=Path("runs/[x]"),
    config=Config(),
    data="a text",
    parameters=1_234_567,
    attention="coordinate-descent, k = 2, exact solver, ε = 0.1",
    has_budget=True,
    device="cpu",
    dtype="float32",
    compiled=False,
    cuda_graphs=False,
    backend="torch",
    first_step=0,
    steps=20,
    tokens_per_step=512,
    epochs=1.25,
    validation_windows=436,
)


def records(layers: int, averaged: bool = False, known_peak: bool = False) -> list[Record]:
    """Ten log lines and five validations of a run, the best of them the fourth."""
    found: list[Record] = []
    for step in range(1, 11):
        train = replace(
            TRAIN,
            step=step,
            loss=6.0 - step / 4,
            layers=tuple(replace(LAYER, layer=layer, effective_support=4.0 + layer) for layer in range(layers)),
            mfu_computed=0.4567 if known_peak else None,
            mfu_dense=0.5 if known_peak else None,
        )
        found.append(train)
        if step % 2 == 0:
            loss = 3.0 if step == 8 else 7.0 - step / 4
            found.append(replace(VALIDATION, step=step, loss=loss, ema_loss=2.75 if averaged else None))
    return found


def status_of(plan: Plan, shown: list[Record]) -> RunStatus:
    """What is known after `shown`."""
    status = RunStatus(plan, plan.first_step)
    for record in shown:
        status.add(record)
        status.advance(record.step, 61.0)
    return status
