"""What the runs of a sweep recorded: metrics of each run, means over seeds, and paired differences to the control."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from cda_cli.comparison.recorded import read_run
from cda_cli.errors import CdaError, ConfigError, did_you_mean
from cda_cli.sweep import attempts
from cda_cli.sweep.attempts import Attempt, distinct
from cda_cli.sweep.claims import Decision, decide, registration
from cda_cli.sweep.metrics import metrics_of_evaluation, metrics_of_run
from cda_cli.sweep.plan import Sweep
from cda_cli.sweep.spec import EVALUATED, Point
from cda_cli.sweep.student_t import LEVEL, Mean, mean_of
from cda_cli.sweep.work import EvalJob, TrainJob

CUT = re.compile(rf"{re.escape(EVALUATED)}([\w-]+)\[(\d+)\]\.(bits_per_byte|loss)")
LENGTH = re.compile(
    rf"{re.escape(EVALUATED)}tasks\.(task:.*[?&]length=(\d+).*)\.metrics\.(exact_match|token_accuracy),none"
)


class Measure(NamedTuple):
    """The metric that tables give as the loss, and its unit."""

    metric: str
    unit: str
    column: str


OF_TEXT = Measure("bits_per_byte", "bits per byte", "bits/byte")
OF_TASK = Measure("loss", "nats per token", "nats/token")  # whose tokens stand for no bytes of text


@dataclass(frozen=True)
class RunResult:
    """A run. `state` is finished, failed, running, unfinished or dropped, and `error` says why it failed.

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

    A run that has not finished has the loss NaN, and a failed one an error. None is chosen before all have ended.
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
    """The runs of an arm, those of the control, which may be the same, and those of its tuning.

    An arm that was dropped was `worse` than the control by so much, and NaN stands for one that was not.
    """

    name: str
    runs: Sequence[RunResult]
    control: Sequence[RunResult]
    tuned: Sequence[Tuned] = ()
    worse: float = math.nan

    @property
    def is_dropped(self) -> bool:
        return not math.isnan(self.worse)

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

    def missed(self) -> Point | None:
        """The point whose loss is below that of the point with which the arm had gone on before; None otherwise."""
        best = min(self.tuned, key=lambda each: math.inf if math.isnan(each.loss) else each.loss, default=None)
        return best.point if best and not best.is_chosen and any(each.is_chosen for each in self.tuned) else None


@dataclass(frozen=True)
class Curve:
    """A metric of the evaluations against a number: the loss against the keys kept, or what is right by length.

    `metrics` has the names by that number. `whole` is the metric that all keys give, from which differences are taken,
    and `scored` the number of sequences of each length.
    """

    title: str
    axis: str
    value: str
    metrics: Mapping[int, str]
    whole: str | None = None
    scored: int | None = None


@dataclass(frozen=True)
class Result:
    """All arms of a sweep, in the order of the file, their trunks, and the attempts that they took."""

    sweep: Sweep
    arms: Sequence[ArmResult]
    trunks: Sequence[ArmResult]
    attempts: Sequence[Attempt]
    command: str

    @cached_property
    def measure(self) -> Measure:
        """By bytes, which models of different tokenizers share, where there are bytes of text."""
        return OF_TASK if self.sweep.is_of_tasks() else OF_TEXT

    @cached_property
    def curves(self) -> list[Curve]:
        """What the evaluations give by the number of keys kept, the most first, and by the length of examples."""
        cuts: dict[str, dict[int, str]] = {}
        lengths: dict[tuple[str, str], dict[int, str]] = {}
        for name in dict.fromkeys(name for run in self.runs for name in run.metrics):
            if (cut := CUT.fullmatch(name)) and cut[3] == self.measure.metric:
                cuts.setdefault(cut[1], {})[int(cut[2])] = name
            elif length := LENGTH.fullmatch(name):
                task = re.sub(r"length=\d+&?", "", length[1]).rstrip("?&")
                lengths.setdefault((task, length[3].replace("_", " ")), {})[int(length[2])] = name
        found = [
            Curve(
                f"{self.measure.unit.capitalize()} by keys kept ({choice})",
                f"keys kept ({choice})",
                self.measure.unit,
                dict(sorted(names.items(), reverse=True)),
                f"{EVALUATED}{self.measure.metric}",
            )
            for choice, names in cuts.items()
        ]
        for (task, share), names in lengths.items():
            title = f"{share.capitalize()} by length ({task}), %"
            found.append(
                Curve(title, f"length ({task})", share, dict(sorted(names.items())), scored=self._scored(names))
            )
        return found

    def _scored(self, names: Mapping[int, str]) -> int | None:
        """How many sequences the evaluation scored for each of these metrics; None where it does not say."""
        documents = [f"{name.partition('.metrics.')[0]}.documents" for name in names.values()]
        counts = [run.metric(name) for run in self.runs for name in documents if name in run.metrics]
        return int(counts[0]) if counts else None

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
        """Raises ConfigError where the file names a metric that the evaluations do not have."""
        known = {name for run in self.runs for name in run.metrics if name.startswith(EVALUATED)}
        for key, name in self.sweep.spec.metrics_named():
            if known and name.startswith(EVALUATED) and name not in known:
                near = did_you_mean(name, known, otherwise="`--json` names those that there are")
                raise ConfigError(f"{self.sweep.file}: {key}: no evaluation has the metric {name!r}: {near}")

    @cached_property
    def registration(self) -> list[str]:
        """When the claims were registered, in sentences; none without claims."""
        return registration(self.sweep.spec, self.sweep.out) if self.sweep.spec.compare else []

    @property
    def unrecorded(self) -> int:
        """How many runs finished without an attempt, as those of a sweep that was killed."""
        recorded = {attempt.job for attempt in self.attempts if not attempt.exit_code}
        runs = [*self.runs, *(run for trunk in self.trunks for run in trunk.runs)]
        return sum(run.state == "finished" and f"{run.arm}, seed {run.seed}" not in recorded for run in runs)

    def of_state(self, state: str) -> list[RunResult]:
        return [run for run in self.runs if run.state == state]

    @property
    def hours(self) -> float:
        """Those of all recorded processes of the arms and trunks."""
        return sum(attempt.seconds for attempt in self.attempts) / 3600

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the metrics come from."""
        sweep = self.sweep
        return {
            "reduced": sweep.reduced,
            "data": {arm: sweep.data(arm) for arm in sweep.spec.arms},
            "steps": {arm: sweep.steps(arm) for arm in sweep.spec.arms},
            "command": self.command,
            "seeds": list(sweep.spec.seeds),
            "commits": distinct([attempt.commit for attempt in self.attempts]),
            "dates": sorted({attempt.began[:10] for attempt in self.attempts}),
            "versions": distinct([attempt.versions or f"cda {attempt.version}" for attempt in self.attempts]),
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
            "trunks": [_arm(trunk) for trunk in self.trunks],
            "failed": len(self.of_state("failed")),
            "unrecorded": self.unrecorded,
        }


def collect(sweep: Sweep, command: str) -> Result:
    """Reads what the runs of a sweep have recorded so far."""
    names = {*sweep.spec.arms, *sweep.spec.trunks}
    known = [attempt for attempt in attempts.read(sweep.out) if attempt.arm in names]
    latest = attempts.latest(known)
    tuned = {arm: _tuned(sweep, arm, latest) for arm in sweep.spec.arms}
    worse = {arm: sweep.worse_at_first(arm) for arm in sweep.spec.arms}
    runs = {arm: [_run(sweep, arm, seed, tuned[arm], latest) for seed in sweep.spec.seeds] for arm in sweep.spec.arms}
    for arm, own in runs.items():
        if not math.isnan(worse[arm]):
            runs[arm] = [_dropped(sweep, run) for run in own]
    control = sweep.spec.control
    arms = [ArmResult(arm, own, runs[control], tuned[arm], worse[arm]) for arm, own in runs.items()]
    trunks = []
    for trunk in sweep.spec.trunks:
        own = [_state(trunk, job, latest) for job in sweep.trunk_jobs(trunk)]
        trunks.append(ArmResult(trunk, own, own))
    return Result(sweep, arms, trunks, known, command)


def _dropped(sweep: Sweep, run: RunResult) -> RunResult:
    """The run of an arm that was dropped, which may have been there before."""
    is_left_out = run.seed in sweep.later_seeds and run.state in ("failed", "unfinished")
    return replace(run, state="dropped", error="") if is_left_out else run


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
        return replace(found, metrics={**found.metrics, **metrics_of_evaluation(job.document())})
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


def _arm(arm: ArmResult) -> dict[str, Any]:
    names = arm.runs[0].metrics if arm.runs else {}
    for run in arm.runs:
        names = run.metrics or names
    return {
        "name": arm.name,
        "tuning": [each.as_dict() for each in arm.tuned],
        "dropped": arm.is_dropped,
        "runs": [asdict(run) for run in arm.runs],
        "means": {name: arm.mean(name).as_dict() for name in names},
        "differences": {name: arm.difference(name).as_dict() for name in names},
        "above_whole_control": {
            name: arm.difference(name, f"{EVALUATED}{cut[3]}").as_dict()
            for name in names
            if (cut := CUT.fullmatch(name))
        },
    }
