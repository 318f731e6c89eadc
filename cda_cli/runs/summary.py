"""Finds runs below folders, and says of each how far it came and what its losses were. It loads no checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from cda_cli.config import flat
from cda_cli.errors import CdaError, ConfigError
from cda_cli.runs.early_stop import Patience
from cda_cli.runs.folder import Run
from cda_cli.runs.records import CheckpointRecord, TrainRecord, ValidationRecord
from cda_cli.storage import CONFIG_FILE, LOCK, METRICS_FILE, holds_run

DEPTH = 4  # folders below the one that is named
FEWEST_VALIDATIONS = 3  # that make a curve
MOST_LOSSES = 100  # of train records in a curve

State = Literal["running", "finished", "interrupted", "imported"]


class Summary(NamedTuple):
    """A run. Losses are in nats per token, and None where there is none.

    `losses` are those of its validations, oldest first, or of its train records where it has hardly any validations;
    NaN stands for one that was not finite. `settings` are those by key, and the preset.
    `faults` say what is damaged or missing in the folder.
    """

    path: Path
    state: State
    step: int
    steps: int
    best_loss: float | None
    best_step: int | None
    train_loss: float | None
    losses: list[float]
    settings: dict[str, Any]
    faults: list[str]


def summarise(path: Path) -> Summary:
    """Raises CdaError, or OSError, where the folder is no run that can be read."""
    run = Run(path)
    running, config = run.is_running(), run.config()
    if config is None:
        raise ConfigError("a run is starting here" if running else f"there is no {CONFIG_FILE} in it")
    validations = list(run.records(ValidationRecord))
    train = next(run.records(TrainRecord, newest_first=True), None)
    checkpoint = next(run.records(CheckpointRecord, newest_first=True), None)
    saved = max([*run.steps(), *([checkpoint.step] if checkpoint else [])], default=0)
    all_done = saved >= config.optim.steps and not run.lacks_validation(saved)
    ended = all_done or Patience(config.run.patience, [each.loss for each in validations]).over
    imported = run.is_untrained_import()
    best = min((each for each in validations if math.isfinite(each.loss)), key=lambda each: each.loss, default=None)
    losses = [each.loss for each in validations]
    if len(losses) < FEWEST_VALIDATIONS:
        losses = [each.loss for each in run.records(TrainRecord, most=MOST_LOSSES)]
    return Summary(
        path=path,
        state="running" if running else "finished" if ended else "imported" if imported else "interrupted",
        step=max([saved, *(each.step for each in (train, *validations[-1:]) if each)]),
        steps=config.optim.steps,
        best_loss=best.loss if best else None,
        best_step=best.step if best else None,
        train_loss=train.loss if train else None,
        losses=losses,
        settings={"preset": config.preset, **flat(config)},
        faults=run.faults(),
    )


def summarise_all(folders: Sequence[Path]) -> tuple[list[Summary], dict[Path, str]]:
    """The runs in and below `folders`, the lowest validation loss first, and what is wrong with other folders.

    Raises ConfigError where one of `folders` is not there.
    """
    runs: dict[Path, Summary] = {}
    problems: dict[Path, str] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}; give one that holds runs")
        for path in find_runs(folder, problems):
            try:
                runs[path.resolve()] = summarise(path)
            except CdaError as error:
                problems[path] = str(error)
            except OSError as error:
                problems[path] = f"it cannot be read ({error.strerror})"
    best_first = sorted(runs.values(), key=lambda run: (run.best_loss is None, run.best_loss or 0.0, run.path))
    return best_first, problems


def find_runs(folder: Path, problems: dict[Path, str], depth: int = DEPTH) -> Iterator[Path]:
    """What looks like a run in `folder` and in the folders below it. `problems` gets those that cannot be read.

    Nothing is looked for inside a run, where trackers have files of their own, and behind a link only a run itself.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        below = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        problems[folder] = f"it cannot be read ({error.strerror})"
        return
    names = {entry.name for entry in entries}
    if CONFIG_FILE in names or METRICS_FILE in names or (LOCK in names and Run(folder).is_running()):
        yield folder
    if depth and not holds_run(names):
        for entry in below:
            yield from find_runs(folder / entry.name, problems, 0 if entry.is_symlink() else depth - 1)


def differing_settings(runs: Sequence[Summary]) -> list[str]:
    """The keys of the settings that are not the same in all of `runs`."""
    if not runs:
        return []
    first = runs[0].settings
    return [key for key in first if any(run.settings[key] != first[key] for run in runs)]
