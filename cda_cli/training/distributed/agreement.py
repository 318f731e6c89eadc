"""Refuses processes that do not start from the same settings, run folder and text: they would train on in vain."""

from __future__ import annotations

import json

import torch

from cda_cli.config import Config, flat
from cda_cli.data import digest
from cda_cli.errors import ConfigError
from cda_cli.runs.folder import Run
from cda_cli.settings_table import as_written
from cda_cli.storage import LOCK
from cda_cli.training.distributed.processes import Processes
from cda_cli.training.state import RunContext, TrainState
from cda_cli.version import __version__

TEXT_PLACES = ("data.source", "data.tokenizer")  # settings that may differ from machine to machine


def check_same_settings(config: Config, processes: Processes) -> None:
    """Raises ConfigError if the first process has other settings than this one, but for where the text lies."""
    settings = {key: as_written(value) for key, value in flat(config).items() if key not in TEXT_PLACES}
    settings |= {"cda": __version__, "torch": str(torch.__version__)}
    first = json.loads(processes.broadcast_text("settings", lambda: json.dumps(settings)))
    for key, here in settings.items():
        if first.get(key) != here:
            raise ConfigError(
                f"the processes do not start alike: {key} is {here} here and {first.get(key)} in the first one; "
                "give the same command and the same versions on all machines"
            )


def check_same_start(context: RunContext, state: TrainState, run: Run) -> None:
    """Raises ConfigError if this machine sees another run folder, or another text, than the first process does."""
    if not (run.path / LOCK).exists():  # A folder of that name may be left from another run on a disk of its own.
        raise ConfigError(
            f"{run.path.absolute()} is not the folder into which the first process saves; give all machines the same "
            "--out, on a disk that all see"
        )
    data = context.data
    here = (
        f"step {state.step}, {data.windows} windows of text and {len(data.validation)} validation tokens, "
        f"data {digest(data.identity)[:8]}"
    )
    first = context.processes.broadcast_text("start", lambda: here)
    if here != first:
        raise ConfigError(
            f"the processes do not start alike: this one has {here}, and the first one {first}; "
            "give all machines the same run folder and --data"
        )
