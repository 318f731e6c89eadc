"""Trackers of experiments, each through its own library, which is imported only where it is asked for.

They get the numbers of each record in metrics.jsonl (see `runs.records.numbers`). A resumed run goes on in the same
place: the folder's own identity, in RUN/tracker-id, is its name there.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping

from cda_cli.config import Config
from cda_cli.errors import ConfigError
from cda_cli.runs.folder import Run
from cda_cli.runs.metrics import Tracker

PROJECT = "cda"


class TensorBoard:
    """Event files in RUN/tensorboard; `tensorboard --logdir runs` shows them."""

    def __init__(self, run: Run, config: Config, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # This hides what was written of steps that are about to be done again.
        self._writer = SummaryWriter(run.path / "tensorboard", purge_step=step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of project `cda` (or WANDB_PROJECT), with its files in RUN/wandb; WANDB_MODE=offline needs no account."""

    def __init__(self, run: Run, config: Config, step: int) -> None:
        import wandb

        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                dir=str(run.path),
                id=run.tracker_id(),
                name=run.path.name,
                resume="allow",
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise ConfigError(
                f"wandb did not start ({reason}); run `wandb login`, or set WANDB_MODE=offline to keep the run here"
            ) from error

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A run of project `cda` where trackio keeps its data (TRACKIO_DIR); `trackio show` shows it."""

    def __init__(self, run: Run, config: Config, step: int) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):  # trackio prints what it does
            name = f"{run.path.name}-{run.tracker_id()}"
            settings = config.model_dump(mode="json")
            self._run = trackio.init(PROJECT, name=name, config=settings, resume="allow", embed=False)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WeightsAndBiases] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def check_trackers(names: Iterable[str]) -> None:
    """Raises ConfigError where the library of a tracker is not installed; it has the tracker's name."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"the tracker {name} is not installed; install it (pip install {name}), or track without")


def open_trackers(run: Run, config: Config, step: int) -> list[Tracker]:
    """Opens the trackers that the configuration asks for. `step` is the last one that is not done again."""
    return [TRACKERS[name](run, config, step) for name in config.run.track]
