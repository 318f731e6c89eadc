"""The runs of a sweep, and where they lie in its folder OUT.

- `OUT/ARM/seed-N` is the run of an arm and a seed; beside it are its settings, `seed-N.yaml`, and what it said,
  `seed-N.log`.
- `OUT/trunk/seed-N` is the run that the forks of a seed begin from.
- `OUT/ARM/tune/POINT` is the run of an arm with a point of its grid.
- `OUT/attempts.jsonl` tells how each process ended (see `attempts`).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cda_cli.config import Config, dump_yaml, flat, parse, read_yaml
from cda_cli.errors import CdaError, ConfigError
from cda_cli.runs.folder import Run
from cda_cli.runs.records import ValidationRecord
from cda_cli.runs.summary import summarise
from cda_cli.settings_table import as_written
from cda_cli.storage import write_file
from cda_cli.sweep.spec import TRUNK, Point, Spec, settings

MOST_UNEQUAL = 0.01  # of the parameters of the smallest arm, where these are held equal
# Settings of `run` that change what a run finds. All others may change from one attempt to the next.
DECIDE = ("run.seed", "run.init_from", "run.fork", "run.dtype", "run.eval_batches", "run.eval_every", "run.patience")


@dataclass(frozen=True)
class TrainJob:
    """A run of the sweep. `name` says which, in words. A fork begins from its `trunk`, once that has finished."""

    name: str
    folder: Path
    config: Config
    trunk: TrainJob | None = None

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
                # The trunk lies in the folder of the sweep, by whatever path that is named.
                if self.trunk and key == "run.init_from":
                    continue
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

    def is_blocked(self) -> bool:
        """Whether it has nothing to begin from."""
        return self.trunk is not None and not self.trunk.is_done()

    def loss(self) -> float:
        """The loss of its last validation, nats per token; NaN if it has not finished."""
        validation = next(Run(self.folder).records(ValidationRecord, newest_first=True), None)
        return validation.loss if validation and self.is_done() else math.nan

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

    def stages(self) -> Iterator[list[TrainJob]]:
        """The runs in stages, each to be asked for once those before it have ended."""
        yield self.trunk_jobs()
        yield self.tuning_jobs()
        yield self.jobs()

    def jobs(self) -> list[TrainJob]:
        """The runs that are compared, seed by seed, so that early ones make pairs.

        An arm has none before a run of its tuning has finished.
        """
        chosen = {arm: self.chosen(arm) for arm in self.spec.arms}
        arms = [arm for arm, point in chosen.items() if point or not self.spec.tune]
        return [self.job(arm, seed, chosen[arm]) for seed in self.spec.seeds for arm in arms]

    def job(self, arm: str, seed: int, chosen: Point | None) -> TrainJob:
        """The run of an arm and a seed, with the point that was chosen for the arm."""
        return self._run_of(arm, seed, chosen, f"seed {seed}", Path(f"seed-{seed}"))

    def tuning_jobs(self) -> list[TrainJob]:
        """The runs of all grids, without those of arms that have gone on: these would change what was chosen."""
        arms = [arm for arm in self.spec.arms if not self._has_gone_on(arm)]
        return [self.tuning_job(arm, point) for arm in arms for point in self.spec.points(arm)]

    def tuning_job(self, arm: str, point: Point) -> TrainJob:
        """The run of an arm with a point of its grid."""
        assert self.spec.tune
        return self._run_of(arm, self.spec.tune.seed, point, point.name, Path("tune") / point.folder)

    def _run_of(self, arm: str, seed: int, point: Point | None, words: str, place: Path) -> TrainJob:
        trunk = self.trunk_job(seed) if self.spec.arms[arm].begins else None
        run = {"seed": seed} | ({"init_from": str(trunk.folder), "fork": True} if trunk else {})
        config = settings(self.spec, *self.spec.layers(arm), point.layer if point else {}, {"run": run})
        return TrainJob(f"{arm}, {words}", self.out / arm / place, config, trunk)

    def trunk_jobs(self) -> list[TrainJob]:
        """The runs that forks begin from."""
        seeds = [*self.spec.seeds, *([self.spec.tune.seed] if self.spec.tune else [])]
        return [self.trunk_job(seed) for seed in seeds] if self.spec.trunk else []

    def trunk_job(self, seed: int) -> TrainJob:
        """The run of the trunk with a seed: the first steps of a whole one, with the schedule of that."""
        assert self.spec.trunk
        whole = settings(self.spec, self.spec.trunk.layer)
        steps = max(1, round(self.spec.trunk.share * whole.optim.steps))
        part = {"optim": {"steps": steps, "schedule_steps": whole.schedule_steps}, "run": {"seed": seed}}
        config = settings(self.spec, self.spec.trunk.layer, part)
        return TrainJob(f"{TRUNK}, seed {seed}", self.out / TRUNK / f"seed-{seed}", config)

    def chosen(self, arm: str) -> Point | None:
        """The point with the lowest validation loss of those that have finished; None if there is none."""
        losses = [(self.tuning_job(arm, point).loss(), point) for point in self.spec.points(arm)]
        finished = [(loss, point) for loss, point in losses if math.isfinite(loss)]
        return min(finished, key=lambda each: each[0])[1] if finished else None

    def _has_gone_on(self, arm: str) -> bool:
        chosen = self.chosen(arm)
        return any(self.job(arm, seed, chosen).settings_file.exists() for seed in self.spec.seeds)

    def check(self, count_parameters: Callable[[Config], int]) -> None:
        """Raises ConfigError where arms differ in what is held equal, or runs began with other settings."""
        configs = {}
        for arm in self.spec.arms:
            for point in self.spec.points(arm) or [Point("", {})]:
                configs[", ".join(filter(None, (arm, point.name)))] = settings(
                    self.spec, *self.spec.layers(arm), point.layer
                )
        _require_equal(self.file, "tokens", {name: tokens_of(config) for name, config in configs.items()}, 0)
        if self.spec.equal == "parameters":
            counts = {name: count_parameters(config) for name, config in configs.items()}
            _require_equal(self.file, "parameters", counts, MOST_UNEQUAL)
        for stage in self.stages():
            for job in stage:
                job.check()


def tokens_of(config: Config) -> int:
    """The tokens that a run with this configuration trains on."""
    optim = config.optim
    return optim.steps * optim.batch_size * optim.grad_accum * config.model.seq_len


def _require_equal(file: Path, what: str, numbers: Mapping[str, int], unequal: float) -> None:
    if max(numbers.values()) <= (1 + unequal) * min(numbers.values()):
        return
    remedy = {
        "tokens": "make optim.steps × optim.batch_size × optim.grad_accum × model.seq_len the same",
        "parameters": f"bring them within {unequal:.0%}, as by model.ff_width, or leave `equal: parameters` out",
    }[what]
    words = ", ".join(f"{arm} {number:,}" for arm, number in numbers.items())
    raise ConfigError(f"{file}: arms differ in their {what}, which are held equal ({words}); {remedy}")
