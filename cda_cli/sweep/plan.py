"""The runs of a sweep, and where they lie in its folder.

OUT/ARM/seed-N          the run of an arm and a seed
OUT/ARM/seed-N.yaml     its settings
OUT/ARM/seed-N.log      what it said
OUT/attempts.jsonl      how each process ended (see `attempts`)
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cda_cli.config import Config, Layer, dump_yaml, flat, parse, read_yaml
from cda_cli.errors import CdaError, ConfigError
from cda_cli.runs.folder import Run
from cda_cli.runs.summary import summarise
from cda_cli.settings_table import as_written
from cda_cli.storage import write_file
from cda_cli.sweep.spec import Spec, settings

MOST_UNEQUAL = 0.01  # of the parameters of the smallest arm, where these are held equal
# Settings of `run` that change what a run finds. All others may change from one attempt to the next.
DECIDE = ("run.seed", "run.init_from", "run.dtype", "run.eval_batches", "run.eval_every", "run.patience")


@dataclass(frozen=True)
class TrainJob:
    """A run of the sweep. `name` says which, in words."""

    name: str
    folder: Path
    config: Config

    @property
    def settings_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def arguments(self, device: str | None) -> list[str]:
        """Of `cda`, which trains the run or goes on with it."""
        words = ["train", "--config", str(self.settings_file), "--out", str(self.folder)]
        return [*words, "--device", device] if device else words

    def check(self) -> None:
        """Raises ConfigError if the run began with settings that would have given another result."""
        if not self.settings_file.exists():
            return
        before, now = flat(parse(read_yaml(self.settings_file, "remove it"))), flat(self.config)
        for key, value in now.items():
            if before[key] != value and (not key.startswith("run.") or key in DECIDE):
                raise ConfigError(
                    f"{self.folder} began with {key} {as_written(before[key])}, and the file now has "
                    f"{as_written(value)}; put it back, choose another --out, or remove {self.folder.parent}"
                )

    def prepare(self) -> None:
        """Writes what its process reads."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.settings_file, dump_yaml(self.config).encode())

    def is_done(self) -> bool:
        try:
            return summarise(self.folder).state == "finished"
        except (CdaError, OSError):
            return False

    def is_held(self) -> bool:
        """Whether a process writes into its folder, such as one that has outlived its sweep."""
        return Run(self.folder).is_running()

    def command(self) -> str:
        """For a person to copy."""
        return shlex.join(["cda", *self.arguments(None)])


@dataclass(frozen=True)
class Sweep:
    """A sweep in its folder `out`, by what its `file` says."""

    spec: Spec
    file: Path
    out: Path

    def job(self, arm: str, seed: int) -> TrainJob:
        """The run of an arm and a seed."""
        config = settings(self.spec, self.spec.arms[arm].layer, _of_seed(seed))
        return TrainJob(f"{arm}, seed {seed}", self.out / arm / f"seed-{seed}", config)

    def jobs(self) -> list[TrainJob]:
        """All runs that the tables are made from, seed by seed, so that early ones make pairs."""
        return [self.job(arm, seed) for seed in self.spec.seeds for arm in self.spec.arms]

    def check(self, count_parameters: Callable[[Config], int]) -> None:
        """Raises ConfigError where arms differ in what is held equal, or runs began with other settings."""
        configs = {arm: settings(self.spec, own.layer) for arm, own in self.spec.arms.items()}
        _require_equal(self.file, "tokens", {arm: tokens_of(config) for arm, config in configs.items()}, 0)
        if self.spec.equal == "parameters":
            counts = {arm: count_parameters(config) for arm, config in configs.items()}
            _require_equal(self.file, "parameters", counts, MOST_UNEQUAL)
        for job in self.jobs():
            job.check()


def tokens_of(config: Config) -> int:
    """The tokens that a run with this configuration trains on."""
    optim = config.optim
    return optim.steps * optim.batch_size * optim.grad_accum * config.model.seq_len


def _of_seed(seed: int) -> Layer:
    return {"run": {"seed": seed}}


def _require_equal(file: Path, what: str, numbers: Mapping[str, int], unequal: float) -> None:
    if max(numbers.values()) <= (1 + unequal) * min(numbers.values()):
        return
    remedy = {
        "tokens": "make optim.steps × optim.batch_size × optim.grad_accum × model.seq_len the same",
        "parameters": f"bring them within {unequal:.0%}, as by model.ff_width, or leave `equal: parameters` out",
    }[what]
    words = ", ".join(f"{arm} {number:,}" for arm, number in numbers.items())
    raise ConfigError(f"{file}: arms differ in their {what}, which are held equal ({words}); {remedy}")
