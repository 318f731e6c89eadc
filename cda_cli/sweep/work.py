"""What a process of a sweep does: it trains a run, or evaluates one."""

from __future__ import annotations

import contextlib
import json
import math
import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cda_cli import strict_json
from cda_cli.config import Config, dump_yaml, flat, parse, read_yaml
from cda_cli.errors import CdaError, ConfigError
from cda_cli.runs.folder import Run, config_of
from cda_cli.runs.records import TrainRecord, ValidationRecord
from cda_cli.runs.summary import summarise
from cda_cli.settings_table import as_written
from cda_cli.storage import write_file
from cda_cli.sweep.spec import Evaluation

# Settings of `run` that change what a run finds. All others may change from one attempt to the next.
DECIDE = {
    f"run.{name}"
    for name in ("seed", "init_from", "init_ema", "fork", "dtype", "eval_batches", "eval_every", "patience")
}

UNKNOWN_DEVICES = ("auto", "cuda")  # words that leave it to the process which one it takes


@dataclass(frozen=True)
class Job(ABC):
    """What one process does, for a run in `folder` with the settings `config`. `name` says what, in words."""

    name: str
    folder: Path
    config: Config

    @property
    def log(self) -> Path:
        """The file to which the process writes its messages."""
        return self.beside("log")

    @property
    @abstractmethod
    def output(self) -> Path:
        """The file that receives the stdout of the process."""

    @abstractmethod
    def arguments(self, device: str | None) -> list[str]:
        """The arguments of `cda`. The same arguments go on with what a stopped process has left."""

    @abstractmethod
    def is_done(self) -> bool: ...

    @abstractmethod
    def is_blocked(self) -> bool:
        """Whether a job must be done first, and is not."""

    @abstractmethod
    def prepare(self) -> None:
        """Writes the files that the process reads."""

    @property
    def steps(self) -> int | None:
        """How many steps the job takes, if it trains."""
        return None

    def record(self) -> TrainRecord | None:
        """The newest train record of the job, if it trains."""
        return None

    def is_held(self) -> bool:
        """Whether a process does the job already, such as one that has outlived its sweep."""
        return False

    def device_in_use(self) -> str | None:
        """The device of the process that does the job already, where it says which."""
        return None

    @abstractmethod
    def finish(self) -> None:
        """Keeps the output of the process, once that has ended well."""

    def command(self) -> str:
        """The command as a person can copy it."""
        return shlex.join(["cda", *self.arguments(None)])

    def beside(self, ending: str) -> Path:
        """A file beside the folder of the run."""
        return self.folder.with_name(f"{self.folder.name}.{ending}")


@dataclass(frozen=True)
class TrainJob(Job):
    """A run of the sweep. `name` says which, in words. A fork begins from its `trunk`, once that has finished."""

    trunk: TrainJob | None = None

    @property
    def settings_file(self) -> Path:
        return self.beside("yaml")

    @property
    def evaluation_file(self) -> Path:
        """The document of the evaluation of the run."""
        return self.beside("eval.json")

    @property
    def output(self) -> Path:
        return self.log

    def arguments(self, device: str | None) -> list[str]:
        words = ["train", "--config", str(self.settings_file), "--out", str(self.folder)]
        return [*words, "--device", device] if device else words

    def check(self) -> None:
        """Raises ConfigError if the run began with settings that would have given another result."""
        # A process that ended before it made the folder, as without a text, has begun nothing.
        if not (self.settings_file.exists() and self.folder.exists()):
            return
        before, now = flat(parse(read_yaml(self.settings_file, "remove it"))), flat(self.config)
        for key, value in now.items():
            if before[key] != value and (not key.startswith("run.") or key in DECIDE):
                # The trunk lies in the folder of the sweep, by whatever path that is named.
                if self.trunk and key == "run.init_from":
                    continue
                raise ConfigError(
                    f"{self.folder} began with {key} {as_written(before[key])}, and the file now has "
                    f"{as_written(value)}; put it back, choose another --out, or remove {self.folder.parent}"
                )

    def began_with(self, keys: Sequence[str]) -> bool:
        """Whether the run has begun, and with the values that its settings have for these keys."""
        if not self.settings_file.exists():
            return False
        before, now = flat(parse(read_yaml(self.settings_file, "remove it"))), flat(self.config)
        return all(before[key] == now[key] for key in keys)

    def prepare(self) -> None:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if not self.folder.exists():  # The evaluation of a run that was removed is not that of the new one.
            self.evaluation_file.unlink(missing_ok=True)
        write_file(self.settings_file, dump_yaml(self._as_begun()).encode())

    def _as_begun(self) -> Config:
        """Its settings. A fork that goes on names its trunk as it did at first, wherever that lies now."""
        before = config_of(self.folder) if self.trunk and Run(self.folder).steps() else None
        if before is None:
            return self.config
        run = self.config.run.model_copy(update={"init_from": before.run.init_from})
        return self.config.model_copy(update={"run": run})

    def is_done(self) -> bool:
        try:
            return summarise(self.folder).state == "finished"
        except (CdaError, OSError):
            return False

    def is_blocked(self) -> bool:
        return self.trunk is not None and not self.trunk.is_done()

    def loss(self) -> float:
        """The loss of its last validation, nats per token; NaN if it has not finished."""
        validation = next(Run(self.folder).records(ValidationRecord, newest_first=True), None)
        return validation.loss if validation and self.is_done() else math.nan

    @property
    def steps(self) -> int:
        return self.config.optim.steps

    def record(self) -> TrainRecord | None:
        return next(Run(self.folder).records(TrainRecord, newest_first=True), None)

    def finish(self) -> None:
        """Does nothing: the folder of the run has all of it."""

    def is_held(self) -> bool:
        return Run(self.folder).is_running()

    def device_in_use(self) -> str | None:
        with contextlib.suppress(CdaError):
            config = Run(self.folder).config()
            return config.run.device if config and config.run.device not in UNKNOWN_DEVICES else None
        return None


@dataclass(frozen=True)
class EvalJob(Job):
    """An evaluation of a `run` that has finished, as the file `wants` it."""

    run: TrainJob
    wants: Evaluation

    @property
    def log(self) -> Path:
        return self.beside("eval.log")

    @property
    def output(self) -> Path:
        return self.beside("eval.part")

    def arguments(self, device: str | None) -> list[str]:
        run = self.config.run
        where = {"--device": device or run.device, "--dtype": run.dtype}
        chosen = [word for option, value in where.items() if value != "auto" for word in (option, value)]
        return ["eval", str(self.folder), *self.wants.options(), *chosen, "--json"]

    def is_done(self) -> bool:
        return bool(self.document())

    def document(self) -> Mapping[str, Any]:
        """What `cda eval --json` gave for these very options; empty before that."""
        try:
            kept = json.loads(self.run.evaluation_file.read_text(encoding="utf-8"))
            return kept["result"] if kept["options"] == self.wants.options() else {}
        except (OSError, ValueError, LookupError, TypeError):
            return {}

    def is_blocked(self) -> bool:
        return not self.run.is_done()

    def prepare(self) -> None:
        self.output.unlink(missing_ok=True)

    def finish(self) -> None:
        found = json.loads(self.output.read_text(encoding="utf-8"))
        kept = {"options": self.wants.options(), "result": found}
        write_file(self.run.evaluation_file, strict_json.dumps(kept).encode())
        self.output.unlink()
