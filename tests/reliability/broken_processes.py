"""Versions of the product whose processes do not wait for each other, or resume what belongs to another."""

from __future__ import annotations

import os
from typing import Any

import pytest

import cda_cli.training.distributed.launch
import cda_cli.training.distributed.processes
import cda_cli.training.distributed.sharding

Patch = pytest.MonkeyPatch


def shards_not_waited_for(patch: Patch) -> None:
    """Publishes what the first process finds in the folder when its own shards are written."""
    processes = cda_cli.training.distributed.processes.Processes
    patch.setattr(processes, "gather", lambda self, value: [value])


def those_that_wait_not_told_apart(patch: Patch) -> None:
    """Keeps what a process says of its waiting from the others."""
    patch.setattr(cda_cli.training.distributed.launch, "WAITED", f"waited, {os.getpid()}")


def random_states_of_the_first_alone(patch: Patch) -> None:
    """Restores the random states of the first process, and gives the others new ones."""
    processes = cda_cli.training.distributed.processes.Processes
    restore = processes.set_random_states
    patch.setattr(
        processes,
        "set_random_states",
        lambda self, states, *rest: restore(self, states if self.first else None, *rest),
    )


def shards_of_the_first_for_all(patch: Patch) -> None:
    """Gives each process the rows of the first when a run is resumed."""
    sharding: Any = cda_cli.training.distributed.sharding
    own_rows = sharding.own_rows
    patch.setattr(sharding, "own_rows", lambda rows, rank, count: own_rows(rows, 0, count))


ALL = (
    shards_not_waited_for,
    those_that_wait_not_told_apart,
    random_states_of_the_first_alone,
    shards_of_the_first_for_all,
)
