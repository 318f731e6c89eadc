"""The names in the folder of a run, by which everything tells a run from another folder."""

from __future__ import annotations

from collections.abc import Collection

from cda_cli.storage.lock import LOCK

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


def holds_run(names: Collection[str]) -> bool:
    """Whether a folder with entries of these `names` is a run: a configuration alone may be anybody's."""
    return CONFIG_FILE in names and not {METRICS_FILE, CHECKPOINTS, LOCK}.isdisjoint(names)
