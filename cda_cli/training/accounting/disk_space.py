"""Checks that the disk has room for a run's checkpoints before the first step, not when a checkpoint is due."""

from __future__ import annotations

import shutil

from cda_cli.config import RunConfig
from cda_cli.errors import StorageError
from cda_cli.runs.folder import Run
from cda_cli.training.optimizer import moments_bytes
from cda_cli.training.state import TrainState

OTHER_BYTES = 2**20  # an upper bound on random states, state.json and metrics


def check_space(run: Run, config: RunConfig, state: TrainState) -> None:
    """Raises StorageError if the checkpoints that the run keeps, and the one being written, cannot all fit."""
    each = checkpoint_bytes(state)
    # The newest, the best, and one more: an old checkpoint is removed only after the new one is there.
    kept = config.keep + config.keep_best + 1
    present = min(len(run.steps()), kept)
    needed = (kept - present) * each
    free = shutil.disk_usage(run.path).free
    if free < needed:
        raise StorageError(
            f"{run.path} has {_mebibytes(free)} free, and the checkpoints of this run need {_mebibytes(needed)} more "
            f"({kept} of {_mebibytes(each)}, {present} there); free some space, or choose another --out"
        )


def checkpoint_bytes(state: TrainState) -> int:
    """Estimates the size of a checkpoint: the weights, their average if there is one, and the optimizer's moments."""
    weights = sum(parameter.nbytes for parameter in state.model.parameters())
    return (2 if state.average else 1) * weights + moments_bytes(state.optimizer) + OTHER_BYTES


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
