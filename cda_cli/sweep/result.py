"""What the runs of a sweep recorded: metrics of each run, means over seeds, and paired differences to the control."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from cda_cli.comparison.recorded import RecordedRun, read_run
from cda_cli.conditions import metrics_of
from cda_cli.errors import CdaError, ConfigError, did_you_mean
from cda_cli.sweep import attempts
from cda_cli.sweep.attempts import Attempt, distinct
from cda_cli.sweep.claims import Decision, decide, registration
from cda_cli.sweep.plan import Sweep
from cda_cli.sweep.spec import EVALUATED, METRICS, TRUNK, Point
from cda_cli.sweep.student_t import LEVEL, Mean, mean_of
from cda_cli.sweep.work import EvalJob, TrainJob

WHOLE = f"{EVALUATED}bits_per_byte"
CUT = re.compile(rf"{re.escape(EVALUATED)}([\w-]+)\[(\d+)\]\.bits_per_byte")


@dataclass(frozen=True)
class RunResult:
    """A run. `state` is finished, failed, running or unfinished, and `error` says why it failed.

    `metrics` are those of a run that has finished, by name.
    """

    arm: str
    seed: int
    folder: str
    command: str
    state: str
    error: str
    metrics: Mapping[str, float]

    def metric(self, name: str) -> float:
        """NaN where the run has none."""
        return self.metrics.get(name, math.nan)


@dataclass(frozen=True)
class Tuned:
    """A run of a grid: its point, the validation loss that it came to, and whether it was chosen.

    A run that has not finished has the loss NaN, and a failed one an error.
    """

    point: Point
    loss: float
    error: str
    is_chosen: bool

    def as_dict(self) -> dict[str, Any]:
        """Its fields in JSON."""
        return {"point": self.point.name, "loss": self.loss, "error": self.error, "chosen": self.is_chosen}


@dataclass(frozen=True)
class ArmResult:
    """The runs of an arm, those of the control, which may be the same, and those of its tuning."""

    name: str
    runs: Sequence[RunResult]
    control: Sequence[RunResult]
    tuned: Sequence[Tuned]

    def mean(self, name: str) -> Mean:
        """The mean of a metric over the seeds that have it."""
        return mean_of([value for run in self.runs if math.isfinite(value := run.metric(name))])

    def difference(self, name: str, of_control: str | None = None) -> Mean:
        """How far a metric is above that of the control, or another of that, paired by seed."""
        pairs = zip(self.runs, self.control, strict=True)
        found = [own.metric(name) - other.metric(of_control or name) for own, other in pairs]
        return mean_of([value for value in found if math.isfinite(value)])

    def at_ends(self) -> list[tuple[str, str]]:
        """The keys whose chosen value is the "smallest" or the "largest" number of the grid, which may end too soon."""
        found = []
        for chosen in (each.point for each in self.tuned if each.is_chosen):
            for key, value in chosen.numbers.items():
                tried = [each.point.numbers.get(key, math.nan) for each in self.tuned]
                if min(tried) < max(tried) and value in (min(tried), max(tried)):
                    found.append((key, "smallest" if value == min(tried) else "largest"))
        return found


@dataclass(frozen=True)
class Result:
    """All arms of a sweep, in the order of the file, their trunk, and the attempts that they took."""

    sweep: Sweep
    arms: Sequence[ArmResult]
    trunk: ArmResult | None
    attempts: Sequence[Attempt]
    command: str

    @cached_property
    def cuts(self) -> dict[str, list[int]]:
        """The numbers of keys that the evaluations kept, the most first, by the choice of the keys."""
        found: dict[str, set[int]] = {}
        for run in self.runs:
            for name in run.metrics:
                if cut := CUT.fullmatch(name):
                    found.setdefault(cut[1], set()).add(int(cut[2]))
        return {choice: sorted(numbers, reverse=True) for choice, numbers in found.items()}

    @cached_property
    def runs(self) -> list[RunResult]:
        return [run for arm in self.arms for run in arm.runs]

    @cached_property
    def decisions(self) -> list[Decision]:
        """What the runs say of each claim of the file."""
        self._require_metrics()
        by_name = {arm.name: arm.runs for arm in self.arms}
        return decide(self.sweep.spec, lambda arm, metric: [run.metric(metric) for run in by_name[arm]])

    def _require_metrics(self) -> None:
        """Raises ConfigError where a claim names a metric that the evaluations do not have."""
        known = {name for run in self.runs for name in run.metrics if name.startswith(EVALUATED)}
        for claim in self.sweep.spec.compare:
            for name in (claim.metric, claim.of_control or claim.metric):
                if known and name.startswith(EVALUATED) and name not in known:
                    near = did_you_mean(name, known, otherwise="`--json` names those that there are")
                    raise ConfigError(f"{self.sweep.file}: compare: no evaluation has the metric {name!r}: {near}")

    @cached_property
    def registration(self) -> list[str]:
        """When the claims were registered, in sentences; none without claims."""
        return registration(self.sweep.spec, self.sweep.out) if self.sweep.spec.compare else []

    @property
    def unrecorded(self) -> int:
        """How many runs finished without an attempt, as those of a sweep that was killed."""
        recorded = {attempt.job for attempt in self.attempts if not attempt.exit_code}
        runs = [*self.runs, *(self.trunk.runs if self.trunk else [])]
        return sum(run.state == "finished" and f"{run.arm}, seed {run.seed}" not in recorded for run in runs)

    def of_state(self, state: str) -> list[RunResult]:
        return [run for run in self.runs if run.state == state]

    @property
    def hours(self) -> float:
        """Those of all processes together."""
        return sum(attempt.seconds for attempt in self.attempts) / 3600

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the metrics come from."""
        return {
            "command": self.command,
            "seeds": list(self.sweep.spec.seeds),
            "commits": distinct([attempt.commit for attempt in self.attempts]),
            "versions": distinct([attempt.version for attempt in self.attempts]),
            "machines": distinct([attempt.machine for attempt in self.attempts]),
            "devices": distinct([attempt.device for attempt in self.attempts]),
            "hours": self.hours,
        }

    def as_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        return {
            "file": str(self.sweep.file),
            "out": str(self.sweep.out),
            "equal": self.sweep.spec.equal,
            "control": self.sweep.spec.control,
            "level": LEVEL,
            **self.provenance,
            "compare": [decision.as_dict() for decision in self.decisions],
            "registration": self.registration,
            "arms": [_arm(arm) for arm in self.arms],
            "trunk": _arm(self.trunk) if self.trunk else None,
            "failed": len(self.of_state("failed")),
            "unrecorded": self.unrecorded,
        }


def collect(sweep: Sweep, command: str) -> Result:
    """Reads what the runs of a sweep have recorded so far."""
    known = attempts.read(sweep.out)
    latest = attempts.latest(known)
    trunk = [_state(TRUNK, job, latest) for job in sweep.trunk_jobs()]
    tuned = {arm: _tuned(sweep, arm, latest) for arm in sweep.spec.arms}
    runs = {arm: [_run(sweep, arm, seed, tuned[arm], latest) for seed in sweep.spec.seeds] for arm in sweep.spec.arms}
    control = sweep.spec.control
    arms = [ArmResult(arm, own, runs[control], tuned[arm]) for arm, own in runs.items()]
    return Result(sweep, arms, ArmResult(TRUNK, trunk, trunk, ()) if trunk else None, known, command)


def _tuned(sweep: Sweep, arm: str, latest: Mapping[str, Attempt]) -> list[Tuned]:
    found, chosen = [], sweep.chosen(arm)
    for point in sweep.spec.points(arm):
        job = sweep.tuning_job(arm, point)
        found.append(Tuned(point, job.loss(), _state(arm, job, latest).error, point == chosen))
    return found


def _run(sweep: Sweep, arm: str, seed: int, tuned: Sequence[Tuned], latest: Mapping[str, Attempt]) -> RunResult:
    chosen = next((each.point for each in tuned if each.is_chosen), None)
    job = sweep.job(arm, seed, chosen)
    found = _state(arm, job, latest)
    speed = latest.get(f"{arm}, speed") if sweep.spec.minutes else None
    if speed and speed.error:
        return replace(found, state="failed", error=f"its speed could not be measured: {speed.error}")
    if sweep.spec.eval and found.state == "finished":
        return _evaluated(found, sweep.evaluation(job), latest)
    if tuned and all(each.error for each in tuned):
        error = f"no run of its tuning has finished, and the last one failed: {tuned[-1].error}"
        return replace(found, state="failed", error=error)
    return found


def _evaluated(found: RunResult, job: EvalJob, latest: Mapping[str, Attempt]) -> RunResult:
    """The result of a run that has finished, with the metrics of its evaluation."""
    if job.is_done():
        return replace(found, metrics={**found.metrics, **metrics_of({"eval": job.document()})})
    last = latest.get(job.name)
    if last and last.error:
        return replace(found, state="failed", error=f"its evaluation failed: {last.error}")
    return replace(found, state="unfinished")


def _state(arm: str, job: TrainJob, latest: Mapping[str, Attempt]) -> RunResult:
    state, error, metrics = "finished", "", {}
    if job.is_done():
        try:
            metrics = metrics_of_run(read_run(job.folder))
        except CdaError as found:
            state, error = "failed", str(found)
        else:
            if not math.isfinite(metrics["loss"]):  # A line of its file may be damaged.
                state, metrics = "failed", {}
                error = f"{job.folder} has finished, but has no validation that can be read; remove it"
    elif job.is_held():
        state = "running"
    else:
        last = latest.get(job.trunk.name if job.trunk and job.is_blocked() else job.name)
        error = last.error if last else ""
        state = "failed" if error else "unfinished"
        if error and job.is_blocked():
            error = f"its trunk failed: {error}"
    return RunResult(arm, job.config.run.seed, str(job.folder), job.command(), state, error, metrics)


def metrics_of_run(run: RecordedRun) -> dict[str, float]:
    """The metrics of a run by name, those of its last validation among them; NaN where it recorded none.

    Measures of attention are means over the layers of the last train record.
    """
    best = min(run.validation, key=lambda point: point.loss, default=None)
    last = run.validation[-1] if run.validation else None
    layers: Mapping[str, Callable[[Any], float]] = {
        "effective_support": lambda layer: layer.effective_support,
        "sparsity_k": lambda layer: layer.sparsity_k,
        "active_units": lambda layer: layer.active_units,
    }
    found = {
        "loss": last.loss if last else math.nan,
        "bits_per_byte": last.bits_per_byte if last else math.nan,
        "best_loss": best.loss if best else math.nan,
        "best_bits_per_byte": best.bits_per_byte if best else math.nan,
        "tokens": run.tokens,
        "steps": run.training[-1].step if run.training else math.nan,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "memory_bytes": run.memory_bytes,
        **{name: statistics.fmean(map(of, run.layers)) if run.layers else math.nan for name, of in layers.items()},
    }
    return {name: found[name] for name in METRICS}


def _arm(arm: ArmResult) -> dict[str, Any]:
    names = arm.runs[0].metrics if arm.runs else {}
    for run in arm.runs:
        names = run.metrics or names
    return {
        "name": arm.name,
        "tuning": [each.as_dict() for each in arm.tuned],
        "runs": [asdict(run) for run in arm.runs],
        "means": {name: arm.mean(name).as_dict() for name in names},
        "differences": {name: arm.difference(name).as_dict() for name in names},
        "above_whole_control": {name: arm.difference(name, WHOLE).as_dict() for name in names if CUT.fullmatch(name)},
    }
