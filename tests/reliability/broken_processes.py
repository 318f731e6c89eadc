"""Versions of the product whose processes do not wait for each other, or keep from each other that they wait."""

from __future__ import annotations

import os

import pytest

import cda_cli.training.distributed.launch
import cda_cli.training.distributed.processes

Patch = pytest.MonkeyPatch


def shards_not_waited_for(patch: Patch) -> None:
    """Publishes what the first process finds in the folder when its own shards are written."""
    processes = cda_cli.training.distributed.processes.Processes
    patch.setattr(processes, "gather", lambda self, value: [value])


def those_that_wait_not_told_apart(patch: Patch) -> None:
    """Keeps what a process says of its waiting from the others."""
    patch.setattr(cda_cli.training.distributed.launch, "WAITED", f"waited, {os.getpid()}")


ALL = (shards_not_waited_for, those_that_wait_not_told_apart)
