"""The folder of a run, and what a path that somebody names in its place means."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from cda_cli.config import Config, annealed_eps, dump_yaml, parse, read_yaml
from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.plurals import counted
from cda_cli.runs.metrics import Metrics, R, Tracker, count_damaged, read_kind, read_metrics
from cda_cli.runs.records import CheckpointRecord, Record, ValidationRecord
from cda_cli.storage import (
    CHECKPOINTS,
    CONFIG_FILE,
    LOCK,
    METRICS_FILE,
    STATE_FILE,
    Checkpoint,
    best,
    is_held,
    is_hidden,
    list_steps,
    load,
    locate,
    newest,
    only_writer,
    remove_stale,
    step_folder,
    verify,
    write_file,
)

ORIGIN_FILE = "source.json"
TRACKER_ID_FILE = "tracker-id"


class Run:
    """The folder of a run, which need not exist yet.

        RUN/config.yaml     the settings, as `--config` reads them
        RUN/metrics.jsonl   the records (see `records`)
        RUN/checkpoints/    the checkpoints (see `storage`)
        RUN/source.json     where the weights of an import came from
        RUN/tracker-id      the name of the run where trackers keep it, if it has trackers
        RUN/.lock           held by the process that writes

    Trackers may add folders of their own. A run may come from a stranger, and a link in it would lead to another file:
    one in the place of config.yaml is refused, and one in the place of metrics.jsonl is ignored.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def check(self) -> None:
        """Raises ConfigError where the path is a file, or a folder that holds something other than a run."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; give --out the name of a folder")
        if self.path.is_dir() and not (self.path / CONFIG_FILE).exists():
            # A run that was killed before it wrote its configuration leaves no more than these.
            foreign = [entry.name for entry in self.path.iterdir() if entry.name != LOCK and not is_hidden(entry.name)]
            if foreign:
                raise ConfigError(f"{self.path} is not empty and holds no run; choose another folder for --out")

    def lock(self, warn: Callable[[str], object]) -> AbstractContextManager[None]:
        """Holds the folder for this process alone (see `storage.only_writer`). Raises StorageError where it is held."""
        return only_writer(self.path, warn)

    def is_running(self) -> bool:
        """Whether a process holds the folder now."""
        return is_held(self.path)

    def is_untrained_import(self) -> bool:
        """Whether `cda import` made the folder, and nothing was trained in it."""
        return (self.path / ORIGIN_FILE).is_file() and not (self.path / METRICS_FILE).is_file()

    def config(self) -> Config | None:
        """The settings of the run, or None where there is none. Raises ConfigError where they cannot be read."""
        file = self.path / CONFIG_FILE
        if not os.path.lexists(file):
            return None
        remedy = "mend it, or choose another folder"
        for checkpoint in self.checkpoints()[-1:]:
            remedy = f"`cda config {shlex.quote(str(checkpoint))} --yaml > {shlex.quote(str(file))}` writes it anew"
        values = read_yaml(_no_link(file), remedy)
        try:
            return parse(values)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from error

    def write_config(self, config: Config) -> None:
        """Makes this the folder of a run with these settings, and removes what killed processes left in it."""
        remove_stale(self.path)
        write_file(self.path / CONFIG_FILE, dump_yaml(config).encode())

    def metrics(self) -> Iterator[Record]:
        """The records of the run, oldest first."""
        return read_metrics(self.path / METRICS_FILE)

    def records(self, kind: type[R], *, newest_first: bool = False, most: int | None = None) -> Iterator[R]:
        """The records of one kind (see `metrics.read_kind`), oldest first unless `newest_first`."""
        return read_kind(self.path / METRICS_FILE, kind, newest_first=newest_first, most=most)

    def open_metrics(self, resumed_step: int, trackers: Sequence[Tracker] = ()) -> Metrics:
        """Opens the metrics for writing, after `resumed_step`; later records are dropped."""
        return Metrics(self.path / METRICS_FILE, resumed_step, trackers)

    def validation_losses(self, step: int) -> list[float]:
        """The validation losses up to `step`, oldest first, nats per token; NaN for one that was not finite."""
        return [record.loss for record in self.records(ValidationRecord) if record.step <= step]

    def lacks_validation(self, step: int) -> bool:
        """Whether this run saved `step` and did not validate it, as where a stop cut the validation short.

        Of a checkpoint that another run or an import saved it has no record, and lacks nothing.
        """
        saved = any(record.step == step for record in self.records(CheckpointRecord, newest_first=True))
        return saved and all(record.step != step for record in self.records(ValidationRecord, newest_first=True))

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, damaged ones included, lowest first."""
        return list_steps(self.path)

    def checkpoints(self) -> list[Path]:
        """The folders of the checkpoints, damaged ones included, lowest step first."""
        return [step_folder(self.path, step) for step in self.steps()]

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, or None, and a sentence for each newer one that does not."""
        return newest(self.path)

    def best(self) -> Path | None:
        """The checkpoint that verifies and has the lowest validation loss."""
        return best(self.path)

    def faults(self) -> list[str]:
        """A sentence for each thing that is damaged or missing here, as far as names and sizes show it.

        The content of a checkpoint is checked by what loads it: it may be many gigabytes. A run that is running may not
        have saved yet.
        """
        found = []
        for checkpoint in self.checkpoints():
            try:
                verify(checkpoint, hashed=())
            except CheckpointError as error:
                found.append(str(error))
        if not self.steps() and not self.is_running():
            found.append(f"it has no checkpoint; `cda train --out {shlex.quote(str(self.path))}` starts it again")
        if not ((self.path / METRICS_FILE).is_file() or self.is_running() or self.is_untrained_import()):
            found.append(f"it has no {METRICS_FILE}, so its losses are not known")
        if damaged := count_damaged(self.path / METRICS_FILE):
            found.append(f"{counted(damaged, 'line')} of {METRICS_FILE} cannot be read; the others are used")
        return found

    def tracker_id(self) -> str:
        """The name of this run where trackers keep it, which stays with the folder wherever it is moved to."""
        file = self.path / TRACKER_ID_FILE
        if not file.exists():
            write_file(file, secrets.token_hex(4).encode())
        return file.read_text(encoding="utf-8").strip()


def config_of(folder: Path) -> Config | None:
    """The settings of a run or of one of its checkpoints. None where the folder is neither.

    Raises ConfigError where they cannot be read.
    """
    config = Run(folder).config()
    if config is None and os.path.lexists(folder / STATE_FILE):
        return parse(read_yaml(_no_link(folder / STATE_FILE)).get("config", {}))
    return config


def config_to_resume(run: Path, resume: str) -> Config | None:
    """The settings with which a run goes on where the command names no preset or file.

    `resume` is "auto", "never", or the path of a run or of one of its checkpoints, which has settings of its own,
    wherever it was copied to. None where there is no run.
    """
    if resume == "never":
        return None
    named = Path(resume).resolve()
    for folder in [run] if resume == "auto" else [named, named.parent, named.parent.parent]:
        if (config := config_of(folder)) is not None:
            return config
    return None


def run_to_resume(resume: str) -> Path | None:
    """The run that `resume` names by its folder or by one of its checkpoints.

    None for "auto", "never" and a checkpoint that was copied out of its run, whatever lies above the copy.
    """
    if resume in ("auto", "never"):
        return None
    named = Path(resume)
    place = named.resolve()
    runs = [named, *(folder.parent for folder in (place, place.parent) if folder.name == CHECKPOINTS)]
    return next((run for run in runs if os.path.lexists(run / CONFIG_FILE)), None)


def config_of_weights(named: str, base: Config | None = None) -> Config:
    """The settings of the model whose weights `named`, a run or a checkpoint, has.

    Its ε is that of the checkpoint's step, and anneals no more. A scaling of the rotary positions stays as it is in
    another context. `base` are the settings of the run that is trained: if it began from these very weights, they are
    returned, and the weights may have gone. Raises CheckpointError.
    """
    if base and began_from(base, named):
        return base
    checkpoint = load(locate(Path(named).expanduser()), parts=())
    config = saved_config(checkpoint)
    eps = annealed_eps(config.model, checkpoint.state["step"], config.schedule_steps)
    changes: dict[str, object] = {"attn_eps": eps, "eps_anneal_start": None}
    if config.model.rotary_scaling != "none":
        changes["rotary_original_len"] = config.model.rotary_trained_len
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def began_from(config: Config, named: str) -> bool:
    """Whether a run with these settings began from `named`: that checkpoint, or one of that run."""
    if config.run.init_from is None:
        return False
    checkpoint = Path(config.run.init_from).expanduser().resolve()
    return Path(named).expanduser().resolve() in (checkpoint, checkpoint.parent, checkpoint.parent.parent)


_STATE: dict[str, type | tuple[type, ...]] = {
    "step": int, "tokens": int, "position": (dict, type(None)), "optimizer": dict,
}  # fmt: skip


def saved_config(checkpoint: Checkpoint) -> Config:
    """Returns the configuration of a checkpoint. Raises CheckpointError if its state.json is not one of a run."""
    for name, kind in _STATE.items():
        if name not in checkpoint.state or not isinstance(checkpoint.state[name], kind):
            raise CheckpointError(
                f"the state.json of {checkpoint.path} says nothing usable of its {name}; use an earlier one"
            )
    try:
        return parse(dict(checkpoint.state["config"]))
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the configuration in {checkpoint.path} is not one of this version of cda ({error}); "
            "use the version that wrote it"
        ) from error


def locate_checkpoint(path: Path, *, best: bool = False) -> Path:
    """The checkpoint that a user means by `path`: that checkpoint, or the newest of a run, or the best of it.

    Raises CheckpointError where there is none.
    """
    found = locate(path)
    if not best:
        return found
    if found == Path(path):
        raise CheckpointError(f"{path} is one checkpoint; give the folder of its run to have the best of them")
    best_one = Run(found.parent.parent).best()
    if best_one is None:
        raise CheckpointError(
            f"no checkpoint of {path} was validated at its step; leave --best out, or train with eval-every and "
            "save-every that meet"
        )
    return best_one


def _no_link(path: Path) -> Path:
    """Refuses a link, which would lead out of a run that comes from a stranger."""
    if path.is_symlink() or not path.is_file():
        raise ConfigError(f"{path} is a link, or no file; put a file in its place")
    return path
