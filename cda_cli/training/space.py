"""Whether the disk has room for a run's checkpoints, asked before the first step and not when one is due."""

from __future__ import annotations

import shutil
from pathlib import Path

from cda_cli.errors import StorageError
from cda_cli.storage import list_steps
from cda_cli.training.optimizer import moments_bytes
from cda_cli.training.setup import Setup

OTHER_BYTES = 2**20  # random states, state.json, figures: more than they come to


def check_space(run: Path, setup: Setup) -> None:
    """Raises StorageError where the checkpoints that the run keeps, and the one being written, cannot all fit."""
    each = checkpoint_bytes(setup)
    # The newest, the best, and one more, as an old one goes only after the new one is there.
    kept = setup.config.run.keep + setup.config.run.keep_best + 1
    present = min(len(list_steps(run)), kept)
    needed = (kept - present) * each
    free = shutil.disk_usage(run).free
    if free < needed:
        raise StorageError(
            f"{run} has {_mebibytes(free)} free, and the checkpoints of this run need {_mebibytes(needed)} more "
            f"({kept} of {_mebibytes(each)}, {present} there); free some space, or choose another --out"
        )


def checkpoint_bytes(setup: Setup) -> int:
    """About the size of a checkpoint: the weights, their average where there is one, and the optimizer's moments."""
    weights = sum(parameter.nbytes for parameter in setup.model.parameters())
    return (2 if setup.average else 1) * weights + moments_bytes(setup.optimizer) + OTHER_BYTES


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
