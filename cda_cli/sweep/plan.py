"""The runs of a sweep, and where they lie in its folder OUT.

- `OUT/ARM/seed-N` is the run of an arm and a seed; beside it are its settings, `seed-N.yaml`, and what it said,
  `seed-N.log`. `seed-N.eval.json` is its evaluation.
- `OUT/trunk/seed-N` is the run that the forks of a seed begin from.
- `OUT/ARM/speed` is the short run that measures the speed of an arm, where time is held equal.
- `OUT/ARM/tune/POINT` is the run of an arm with a point of its grid.
- `OUT/attempts.jsonl` tells how each process ended (see `attempts`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cda_cli.comparison.recorded import read_run
from cda_cli.config import Config
from cda_cli.errors import ConfigError
from cda_cli.sweep.spec import TRUNK, Point, Spec, settings
from cda_cli.sweep.work import EvalJob, Job, TrainJob

SPEED_STEPS, SPEED_LOGS = 60, 5
MOST_UNEQUAL = 0.01  # of the parameters of the smallest arm, where these are held equal


@dataclass(frozen=True)
class Sweep:
    """A sweep in its folder `out`, by what its `file` says."""

    spec: Spec
    file: Path
    out: Path

    def stages(self) -> Iterator[Sequence[Job]]:
        """The runs in stages, each to be asked for once those before it have ended."""
        yield self.speed_jobs()
        yield self.trunk_jobs()
        yield self.tuning_jobs()
        yield self.jobs()
        yield self.evaluations()

    def jobs(self) -> list[TrainJob]:
        """The runs that are compared, seed by seed, so that early ones make pairs.

        An arm has none before its speed is measured and a run of its tuning has finished.
        """
        chosen = {arm: self.chosen(arm) for arm in self._measured()}
        arms = [arm for arm, point in chosen.items() if point or not self.spec.tune]
        return [self.job(arm, seed, chosen[arm]) for seed in self.spec.seeds for arm in arms]

    def job(self, arm: str, seed: int, chosen: Point | None) -> TrainJob:
        """The run of an arm and a seed, with the point that was chosen for the arm."""
        return self._run_of(arm, seed, chosen, f"seed {seed}", Path(f"seed-{seed}"))

    def evaluations(self) -> list[EvalJob]:
        """The evaluations of the runs that are compared."""
        return [self.evaluation(job) for job in self.jobs()] if self.spec.eval else []

    def evaluation(self, job: TrainJob) -> EvalJob:
        """The evaluation of a run."""
        assert self.spec.eval
        return EvalJob(f"{job.name}, evaluation", job.folder, job.config, job, self.spec.eval)

    def tuning_jobs(self) -> list[TrainJob]:
        """The runs of all grids, without those of arms that have gone on: these would change what was chosen."""
        arms = [arm for arm in self._measured() if not self._has_gone_on(arm)]
        return [self.tuning_job(arm, point) for arm in arms for point in self.spec.points(arm)]

    def tuning_job(self, arm: str, point: Point) -> TrainJob:
        """The run of an arm with a point of its grid."""
        assert self.spec.tune
        return self._run_of(arm, self.spec.tune.seed, point, point.name, Path("tune") / point.folder)

    def _run_of(self, arm: str, seed: int, point: Point | None, words: str, place: Path) -> TrainJob:
        trunk = self.trunk_job(seed) if self.spec.arms[arm].begins else None
        run = {"seed": seed} | ({"init_from": str(trunk.folder), "fork": True} if trunk else {})
        steps = {"steps": self.steps_in_time(arm)} if self.spec.minutes else {}
        config = settings(self.spec, *self.spec.layers(arm), point.layer if point else {}, {"run": run, "optim": steps})
        return TrainJob(f"{arm}, {words}", self.out / arm / place, config, trunk)

    def speed_jobs(self) -> list[TrainJob]:
        """The runs that measure the speed of each arm, where time is held equal."""
        return [self.speed_job(arm) for arm in self.spec.arms] if self.spec.minutes else []

    def speed_job(self, arm: str) -> TrainJob:
        """The run that measures the speed of an arm."""
        run = {"seed": self.spec.seeds[0], "log_every": SPEED_LOGS, "eval_every": 0, "eval_batches": 1, "save_every": 0}
        config = settings(self.spec, *self.spec.layers(arm), {"optim": {"steps": SPEED_STEPS}, "run": run})
        return TrainJob(f"{arm}, speed", self.out / arm / "speed", config)

    def steps_in_time(self, arm: str) -> int:
        """How many steps an arm takes in the minutes that all have, by its measured speed; 1 before that."""
        job = self.speed_job(arm)
        if not (self.spec.minutes and job.is_done()):
            return 1
        per_step = tokens_of(job.config) / SPEED_STEPS
        return max(1, round(60 * self.spec.minutes * read_run(job.folder).tokens_per_second / per_step))

    def _measured(self) -> list[str]:
        """The arms whose speed is known, if it must be."""
        return [arm for arm in self.spec.arms if not self.spec.minutes or self.speed_job(arm).is_done()]

    def trunk_jobs(self) -> list[TrainJob]:
        """The runs that forks begin from."""
        seeds = [*self.spec.seeds, *([self.spec.tune.seed] if self.spec.tune else [])]
        return [self.trunk_job(seed) for seed in seeds] if self.spec.trunk else []

    def trunk_job(self, seed: int) -> TrainJob:
        """The run of the trunk with a seed: the first steps of a whole run, with the schedule of all its steps."""
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

    def is_validated_alike(self) -> bool:
        """Whether all arms are validated in training on the same part of the same text, by their settings."""
        configs = [settings(self.spec, *self.spec.layers(arm)) for arm in self.spec.arms]
        tokens = {each.run.eval_batches * each.optim.batch_size * each.model.seq_len for each in configs}
        return len(tokens) == 1 and all(each.data == configs[0].data for each in configs)

    def check(self, count_parameters: Callable[[Config], int]) -> None:
        """Raises ConfigError where arms differ in what is held equal, or runs began with other settings."""
        configs = {}
        for arm in self.spec.arms:
            for point in self.spec.points(arm) or [Point("", {})]:
                configs[", ".join(filter(None, (arm, point.name)))] = settings(
                    self.spec, *self.spec.layers(arm), point.layer
                )
        if self.spec.equal != "time":
            _require_equal(self.file, "tokens", {name: tokens_of(config) for name, config in configs.items()}, 0)
        if self.spec.equal == "parameters":
            counts = {name: count_parameters(config) for name, config in configs.items()}
            _require_equal(self.file, "parameters", counts, MOST_UNEQUAL)
        for job in (*self.speed_jobs(), *self.trunk_jobs(), *self.tuning_jobs(), *self.jobs()):
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
