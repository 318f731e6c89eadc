"""The runs of a sweep, and where they lie in its folder OUT.

- `OUT/ARM/seed-N` is the run of an arm and a seed; beside it are its settings, `seed-N.yaml`, and what it said,
  `seed-N.log`. `seed-N.eval.json` is its evaluation.
- `OUT/TRUNK/seed-N` is the run from which the forks of a seed begin.
- `OUT/ARM/speed` is the short run that measures the speed of an arm, where time is held equal.
- `OUT/ARM/tune/POINT` is the run of an arm with a point of its grid.
- `OUT/attempts.jsonl` tells how each process ended (see `attempts`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cda_cli.comparison.recorded import read_run
from cda_cli.config import Config
from cda_cli.errors import CdaError, ConfigError
from cda_cli.sweep import attempts
from cda_cli.sweep.metrics import metrics_of_evaluation, metrics_of_run
from cda_cli.sweep.spec import Point, Spec, settings
from cda_cli.sweep.work import EvalJob, Job, TrainJob

SPEED_STEPS, SPEED_LOGS = 60, 5
MOST_UNEQUAL = 0.01  # of the parameters of the smallest arm, where these are held equal


@dataclass(frozen=True)
class Sweep:
    """A sweep in its folder `out`, by what its `file` says, in its reduced form if it is `reduced`."""

    spec: Spec
    file: Path
    out: Path
    reduced: bool = False

    def stages(self) -> Iterator[Sequence[Job]]:
        """The runs in stages, each to be asked for once those before it have ended."""
        yield self.speed_jobs()
        yield [*self.trunk_jobs(), *self.tuning_jobs()]
        for seeds in filter(None, (self.first_seeds, self.later_seeds)):
            yield [*self.jobs(seeds), *self.evaluations(seeds)]

    def runs(self) -> list[TrainJob]:
        """The runs of all stages, as far as they are known."""
        return [*self.speed_jobs(), *self.trunk_jobs(), *self.tuning_jobs(), *self.jobs()]

    @property
    def first_seeds(self) -> list[int]:
        """The seeds that decide which arms are dropped; all of them, if none is."""
        return self.spec.seeds[: self.spec.drop.seeds if self.spec.drop else None]

    @property
    def later_seeds(self) -> list[int]:
        """The seeds that arms have no runs with once they are dropped."""
        return self.spec.seeds[len(self.first_seeds) :]

    def jobs(self, seeds: Sequence[int] | None = None) -> list[TrainJob]:
        """The runs that are compared, seed by seed, so that early ones make pairs.

        An arm has none before its speed is measured and a run of its tuning has finished, nor with later seeds once it
        is dropped.
        """
        chosen = {arm: self.chosen(arm) for arm in self._measured()}
        arms = [arm for arm, point in chosen.items() if point or not self.spec.tune]
        kept = {arm for arm in arms if math.isnan(self.worse_at_first(arm))}
        return [
            self.job(arm, seed, chosen[arm])
            for seed in (self.spec.seeds if seeds is None else seeds)
            for arm in arms
            if arm in kept or seed in self.first_seeds
        ]

    def steps(self, arm: str) -> int | None:
        """The steps of each run of an arm; None before they are known."""
        known = arm in self._measured()
        return self.job(arm, self.spec.seeds[0], self.chosen(arm)).config.optim.steps if known else None

    def data(self, arm: str) -> str:
        """What an arm is trained on: its text, or its task with all parameters, of which the length is one."""
        from cda_cli.data import is_task, parse_task

        source = self._source(arm)
        return parse_task(source).description if is_task(source) else source

    def is_of_tasks(self) -> bool:
        """Whether each arm is trained on a task."""
        from cda_cli.data import is_task

        return all(is_task(self._source(arm)) for arm in self.spec.arms)

    def _source(self, arm: str) -> str:
        return settings(self.spec, *self.spec.layers(arm)).data.source

    def job(self, arm: str, seed: int, chosen: Point | None) -> TrainJob:
        """The run of an arm and a seed, with the point that was chosen for the arm."""
        return self._run_of(arm, seed, chosen, f"seed {seed}", Path(f"seed-{seed}"))

    def evaluations(self, seeds: Sequence[int] | None = None) -> list[EvalJob]:
        """The evaluations of the runs that are compared."""
        return [self.evaluation(job) for job in self.jobs(seeds)] if self.spec.eval else []

    def evaluation(self, job: TrainJob) -> EvalJob:
        """The evaluation of a run."""
        assert self.spec.eval
        return EvalJob(f"{job.name}, evaluation", job.folder, job.config, job, self.spec.eval)

    def tuning_jobs(self) -> list[TrainJob]:
        """The runs of all grids."""
        return [self.tuning_job(arm, point) for arm in self._measured() for point in self.spec.points(arm)]

    def tuning_job(self, arm: str, point: Point) -> TrainJob:
        """The run of an arm with a point of its grid."""
        assert self.spec.tune
        return self._run_of(arm, self.spec.tune.seed, point, point.name, Path("tune") / point.folder)

    def _run_of(self, arm: str, seed: int, point: Point | None, words: str, place: Path) -> TrainJob:
        begins = self.spec.arms[arm].begins
        trunk = self.trunk_job(begins, seed) if begins else None
        run = {"seed": seed} | ({"init_from": str(trunk.folder), "fork": True} if trunk else {})
        steps = {"steps": self.steps_in_time(arm)} if self.spec.minutes else {}
        tune = self.spec.tune
        if tune and tune.steps and seed == tune.seed and not trunk:
            steps = {"steps": tune.steps}
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

    def trunk_jobs(self, *trunks: str) -> list[TrainJob]:
        """The runs from which forks begin, of these trunks or of all."""
        seeds = [*self.spec.seeds, *([self.spec.tune.seed] if self.spec.tune else [])]
        return [self.trunk_job(trunk, seed) for seed in seeds for trunk in trunks or self.spec.trunks]

    def trunk_job(self, name: str, seed: int) -> TrainJob:
        """The run of a trunk with a seed: the first steps of a whole run, with the schedule of all its steps."""
        trunk = self.spec.trunks[name]
        whole = settings(self.spec, trunk.layer)
        steps = max(1, round(trunk.share * whole.optim.steps))
        part = {"optim": {"steps": steps, "schedule_steps": whole.schedule_steps}, "run": {"seed": seed}}
        config = settings(self.spec, trunk.layer, part)
        return TrainJob(f"{name}, seed {seed}", self.out / name / f"seed-{seed}", config)

    def chosen(self, arm: str) -> Point | None:
        """The point that an arm has gone on with or, before that, the one with the lowest validation loss.

        None before all runs of its grid have ended, and if all have failed.
        """
        points = self.spec.points(arm)
        for point in points:
            # A run of the grid that failed at first must not change what the arm is.
            if any(self.job(arm, seed, point).began_with(point.keys) for seed in self.spec.seeds):
                return point
        latest = attempts.latest(attempts.read(self.out))
        jobs = [self.tuning_job(arm, point) for point in points]
        if not all(job.is_done() or (job.name in latest and latest[job.name].error) for job in jobs):
            return None
        losses = [(job.loss(), point) for job, point in zip(jobs, points, strict=True)]
        finished = [(loss, point) for loss, point in losses if math.isfinite(loss)]
        return min(finished, key=lambda each: each[0])[1] if finished else None

    def worse_at_first(self, arm: str) -> float:
        """By how much an arm is worse than the control with the first seeds, if it is dropped for that; or else NaN.

        A claim that does not compare with the control of the sweep is decided by all seeds of its two arms.
        """
        drop, control = self.spec.drop, self.spec.control
        needed = {
            name for claim in self.spec.compare if claim.control != control for name in (claim.arm, claim.control)
        }
        if drop is None or arm in {control, *needed}:
            return math.nan
        sign = 1 if drop.better == "lower" else -1
        own, other = ([self._metric(name, seed, drop.metric) for seed in self.first_seeds] for name in (arm, control))
        worse = sign * (statistics.fmean(own) - statistics.fmean(other))
        return worse if worse > drop.margin else math.nan

    def _metric(self, arm: str, seed: int, name: str) -> float:
        """A metric of the run of an arm and a seed; NaN where it has none."""
        try:
            job = self.job(arm, seed, self.chosen(arm))
            found = metrics_of_run(read_run(job.folder)) if job.is_done() else {}
        except CdaError:
            return math.nan
        if self.spec.eval:
            found |= metrics_of_evaluation(self.evaluation(job).document())
        return found.get(name, math.nan)

    def is_validated_alike(self) -> bool:
        """Whether all arms are validated in training on the same part of the same text, by their settings."""
        configs = [settings(self.spec, *self.spec.layers(arm)) for arm in self.spec.arms]
        tokens = {each.run.eval_batches * each.optim.batch_size * each.model.seq_len for each in configs}
        return len(tokens) == 1 and all(each.data == configs[0].data for each in configs)

    def remarks(self) -> list[str]:
        """A sentence about each schedule that can hardly be meant, after the first run that may have it."""
        jobs = self.tuning_jobs()
        for arm in self._measured():
            points: Sequence[Point | None] = self.spec.points(arm) or (None,)
            jobs += [self.job(arm, self.spec.seeds[0], point) for point in points]
        found: dict[str, str] = {}
        for job in jobs:
            for sentence in job.config.optim.warnings():
                found.setdefault(sentence, job.name)
        return [f"{name}: {sentence}" for sentence, name in found.items()]

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
        for job in self.runs():
            job.check()
        for arm in self.spec.arms:
            points = self.spec.points(arm)
            if points and self.chosen(arm) is None:  # What the arm has gone on with may have left the grid.
                for seed in self.spec.seeds:
                    self.job(arm, seed, points[0]).check()


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
