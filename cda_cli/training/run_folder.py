"""The folder of a run: config.yaml, metrics.jsonl, checkpoints/. And whether a run may start or go on there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cda_cli.config import CONFIG_FILE, Config, dump_yaml
from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.runs.metrics import Metrics, read_metrics
from cda_cli.runs.records import ValidationRecord
from cda_cli.storage import LOCK, Checkpoint, is_hidden, list_steps, load, locate, newest, remove_stale, write_file
from cda_cli.training.trackers import open_trackers

METRICS_FILE = "metrics.jsonl"


def check_folder(run: Path) -> None:
    """Raises ConfigError where `run` is a file, or a folder that holds something other than a run."""
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file; give --out the name of a folder")
    if run.is_dir() and not (run / CONFIG_FILE).exists():
        # A run that was killed before it had its configuration leaves no more than these.
        foreign = [entry.name for entry in run.iterdir() if entry.name != LOCK and not is_hidden(entry.name)]
        if foreign:
            raise ConfigError(f"{run} is not empty and holds no run; choose another folder for --out")


def find_checkpoint(run: Path, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """What the run in folder `run` goes on from, and a sentence for each damaged checkpoint passed over.

    `resume`: "auto" takes the newest whole checkpoint in `run`, if there is one; "never" wants a folder without a
    run; anything else is the path of a run or checkpoint to go on from. It is then the newest of `run`, or `run`
    holds no run yet: two histories never mix in one folder.
    """
    check_folder(run)
    if resume == "auto":
        path, damaged = newest(run)
        if path is None and list_steps(run):
            raise CheckpointError(f"no checkpoint in {run} is whole ({damaged[0]}); start again with another --out")
        return (load(path), damaged) if path else (None, [])
    if resume == "never":
        if list_steps(run):
            raise ConfigError(f"{run} holds another run; choose another --out, or go on with --resume auto")
        return None, []
    path = locate(Path(resume))
    if list_steps(run) and path.resolve() != (newest(run)[0] or run).resolve():
        raise ConfigError(f"{run} already holds a run that {path} is not the newest of; choose another --out")
    return load(path), []


def check_same_run(before: Config, now: Config, where: Path, *, same_text: bool = False) -> None:
    """Model, data, seed and optimizer must be those of the run that goes on; steps, rates, intervals may change.

    With the `same_text`, in the same tokens, it does not matter where it lies.
    """
    places = {"source", "tokenizer"} if same_text else set()
    pairs = [("model", before.model, now.model), ("data", before.data, now.data)]
    for section, old, new in pairs:
        for name, value in old.model_dump(exclude=places).items():
            if value != getattr(new, name):
                _refuse(where, f"{section}.{name}", value, getattr(new, name))
    if before.run.seed != now.run.seed:
        _refuse(where, "run.seed", before.run.seed, now.run.seed)
    if before.optim.optimizer != now.optim.optimizer:
        _refuse(where, "optim.optimizer", before.optim.optimizer, now.optim.optimizer)


def check_same_text(before: Any, now: Mapping[str, Any], text: str, where: Path) -> None:
    """The `text` whose identity is `now` (see `RunData`) must be the one that the run in `where` was trained on, which
    was `before`: None where its checkpoint does not say. Raises ConfigError."""
    if before is None or before == now:
        return
    if not isinstance(before, dict):
        raise CheckpointError(f"the state.json of the checkpoint in {where} says nothing usable of its data")
    name = next((name for name, value in now.items() if before.get(name) != value), "kind")
    differs = f"{name}: {before.get(name)} there and {now.get(name)} here"
    if name == "content":
        differs = "as long, with other content"
    elif name == "tokenizer":
        differs = "in the tokens of another tokenizer"
    raise ConfigError(
        f"{text} is not what {where} was trained on ({differs}); put the old text back, name it with --data, or start "
        "a new run with another --out"
    )


def _refuse(where: Path, key: str, before: object, now: object) -> None:
    raise ConfigError(
        f"{where} holds another run ({key} is {before!r} there and {now!r} here); choose another --out, "
        "or give the settings of that run"
    )


def open_run(run: Path, config: Config, resumed_step: int) -> Metrics:
    """Writes the configuration, and opens the metrics at `resumed_step`."""
    remove_stale(run)
    write_file(run / CONFIG_FILE, dump_yaml(config).encode())
    return Metrics(run / METRICS_FILE, resumed_step, open_trackers(run, config, resumed_step))


def validation_losses(run: Path, step: int) -> list[float]:
    """The validation losses of the run in folder `run` up to `step`, oldest first; NaN for one that was not finite."""
    records = [record for record in read_metrics(run / METRICS_FILE) if isinstance(record, ValidationRecord)]
    return [record.loss for record in records if record.step <= step]
