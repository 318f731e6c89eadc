"""The file of a sweep, as docs/sweeps.md describes it: the settings of a `--config` file, and arms that change some."""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from cda_cli.config import Config, Layer, parse, preset_file, read_yaml
from cda_cli.errors import did_you_mean
from cda_cli.plurals import counted
from cda_cli.settings import DEFAULT_PRESET, SECTIONS
from cda_cli.settings_table import as_written

# The metrics of a run that has finished, by their names in JSON.
METRICS = (
    "loss", "bits_per_byte", "best_loss", "best_bits_per_byte", "best_ema_loss", "tokens", "steps", "seconds",
    "tokens_per_second", "memory_bytes", "effective_support", "sparsity_k", "active_units", "active_blocks",
)  # fmt: skip
EVALUATED = "eval."  # begins the names of metrics of an evaluation
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")  # of an arm or a trunk, which is the name of a folder

Equal = Literal["tokens", "parameters", "time"]
Better = Literal["lower", "higher"]
Seed = Annotated[int, Field(ge=0)]
OWN_SEED = "each run has one of the sweep's seeds; leave run.seed out, and give the key seeds"


class Part(BaseModel):
    """A part of the file. Its scalars are text, which pydantic reads as numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Settings(Part):
    """Settings of runs, by section, as a `--config` file has them."""

    model: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    optim: dict[str, Any] = Field(default_factory=dict)
    run: dict[str, Any] = Field(default_factory=dict)

    @field_validator("run")
    @classmethod
    def _has_no_seed(cls, run: dict[str, Any]) -> dict[str, Any]:
        if "seed" in run:
            raise ValueError(OWN_SEED)
        return run

    @property
    def layer(self) -> Layer:
        return {section: getattr(self, section) for section in SECTIONS}


def _checked_grid(grid: dict[str, list[str | None]]) -> dict[str, list[str | None]]:
    if "run.seed" in grid:
        raise ValueError(OWN_SEED)
    for key, values in grid.items():
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{key} has {'a value twice' if values else 'no values'}; give each value to try once")
    return grid


Grid = Annotated[dict[str, list[str | None]], AfterValidator(_checked_grid)]


class Arm(Settings):
    """What an arm changes in the settings of all, or where it is a fork, in those of the trunk that it `begins` from.

    Its `grid` stands in for that of the tuning.
    """

    begins: str | None = Field(None, alias="from")
    grid: Grid | None = None


class Trunk(Settings):
    """What forks begin from: a run for each seed, of a `share` of the steps, and what it changes in the settings."""

    share: float = Field(0.8, gt=0, lt=1)


class Tune(Part):
    """The settings of each arm that are chosen on the seed `seed`: by key, the values to try, in all combinations.

    Each is tried for `steps` steps, by default those of the file. Forks have the latter in any case.
    """

    seed: Seed
    steps: int | None = Field(None, ge=1)
    grid: Grid = Field(min_length=1)


class Evaluation(Part):
    """What `cda eval` measures of each run that has finished, by its options: on a text, or in tasks.

    With `best` it measures the checkpoint with the lowest validation loss in place of the newest, and with `ema` its
    averaged weights.
    """

    cut: list[str] = Field(default_factory=list)
    max_batches: int | None = Field(None, ge=1)
    context: int | None = Field(None, ge=1)
    data: str | None = None
    tasks: list[str] = Field(default_factory=list)
    lengths: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    limit: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    best: bool = False
    ema: bool = False

    @model_validator(mode="after")
    def _is_of_a_text_or_of_tasks(self) -> Evaluation:
        if self.tasks and (of_text := self.model_fields_set & {"cut", "max_batches", "context", "data"}):
            raise ValueError(f"{min(of_text)} is about a text, and tasks bring their own; leave one of them out")
        if not self.tasks and (of_tasks := self.model_fields_set & {"lengths", "limit"}):
            raise ValueError(f"{min(of_tasks)} is about tasks; name them with the key tasks, or leave it out")
        return self

    def options(self) -> list[str]:
        """The options of `cda eval`."""
        found = [word for cut in self.cut for word in ("--cut", cut)]
        for name in ("tasks", "lengths"):
            if values := getattr(self, name):
                found += [f"--{name}", ",".join(map(str, values))]
        for name in ("max_batches", "limit", "batch_size", "context", "data"):
            if (value := getattr(self, name)) is not None:
                found += [f"--{name.replace('_', '-')}", str(value)]
        return found + ["--best"] * self.best + ["--ema"] * self.ema


class Drop(Part):
    """Drops an arm whose metric is worse than that of the control by more than `margin` in the mean over `seeds` seeds.

    These are the first of the file. The arm has no runs with the others.
    """

    margin: float = Field(0.02, gt=0)
    seeds: int = Field(2, ge=1)
    metric: str = "bits_per_byte"
    better: Better = "lower"


class Claim(Part):
    """What the file claims of an arm before any run, on a metric of the runs, and with what margin.

    The metric of the control is `of_control`, or the same. `spread` is the deviation that is expected of the paired
    differences.
    """

    arm: str
    kind: Literal["non-inferior", "superior"] = Field(alias="claim")
    margin: float = Field(gt=0)
    metric: str = "bits_per_byte"
    control: str = ""
    of_control: str | None = None
    better: Better = "lower"
    spread: float | None = Field(None, gt=0)


class Point(NamedTuple):
    """A point of a grid, with its name, such as "optim.lr=1e-3"."""

    name: str
    layer: Layer

    @property
    def keys(self) -> list[str]:
        return [f"{section}.{name}" for section, values in self.layer.items() for name in values]

    @property
    def numbers(self) -> dict[str, float]:
        """The values of the point that are numbers, by key."""
        found = {}
        for section, values in self.layer.items():
            for name, value in values.items():
                with contextlib.suppress(TypeError, ValueError):
                    found[f"{section}.{name}"] = float(value)
        return found

    @property
    def folder(self) -> str:
        return self.name.replace(", ", ",").replace("/", "-")


class Spec(Settings):
    """The file of a sweep. The settings at its top level hold for all arms; each run has one of the `seeds`."""

    preset: str = DEFAULT_PRESET
    arms: dict[str, Arm] = Field(min_length=1)
    seeds: list[Seed] = Field(min_length=1)
    control: str = ""
    equal: Equal = "tokens"
    minutes: float | None = Field(None, gt=0)
    tune: Tune | None = None
    trunks: dict[str, Trunk] = Field(default_factory=dict)
    eval: Evaluation | None = None
    drop: Drop | None = None
    compare: list[Claim] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _first_is_control(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Unless the file says otherwise, the first arm is the control, also in all claims."""
        arms, claims = values.get("arms"), values.get("compare")
        control = values.get("control") or next(iter(arms if isinstance(arms, dict) else ()), "")
        given = [claims] if isinstance(claims, dict) else claims
        if isinstance(given, list):
            given = [{"control": control, **claim} if isinstance(claim, dict) else claim for claim in given]
        return {**values, "control": control} | ({"compare": given} if given else {})

    @field_validator("arms", "trunks", mode="before")
    @classmethod
    def _may_be_empty(cls, parts: Any) -> Any:
        """An arm without changes, `softmax:`, is null in YAML."""
        return {name: part or {} for name, part in parts.items()} if isinstance(parts, dict) else parts

    @field_validator("arms", "trunks")
    @classmethod
    def _are_names(cls, parts: dict[str, Settings]) -> dict[str, Settings]:
        for name in parts:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a folder; take letters, digits and . _ + -")
        return parts

    @field_validator("seeds")
    @classmethod
    def _are_distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice; give each once")
        return seeds

    @model_validator(mode="after")
    def _names_arms(self) -> Spec:
        self._require_arm("control", self.control)
        for number, claim in enumerate(self.compare):
            self._require_arm(f"compare.{number}.arm", claim.arm)
            self._require_arm(f"compare.{number}.control", claim.control)
            if claim.arm == claim.control:
                raise ValueError(f"compare.{number}: {claim.arm} is its own control; name another arm")
        for key, metric in self.metrics_named():
            self._require_metric(key, metric)
        return self

    def metrics_named(self) -> list[tuple[str, str]]:
        """The metrics that the file names, each after the key that names it."""
        found = []
        for number, claim in enumerate(self.compare):
            named = {"metric": claim.metric, "of_control": claim.of_control}
            found += [(f"compare.{number}.{key}", name) for key, name in named.items() if name]
        return [*found, *([("drop.metric", self.drop.metric)] if self.drop else [])]

    def _require_metric(self, key: str, name: str) -> None:
        """Raises ValueError where no run can have the metric. Those of an evaluation are known once it has ended."""
        if name in METRICS or (self.eval and name.startswith(EVALUATED)):
            return
        remedy = did_you_mean(name, METRICS)
        if name.startswith(EVALUATED):
            remedy = "it is one of an evaluation, which the key eval asks for; add it"
        raise ValueError(f"{key}: there is no metric {name!r} of a run: {remedy}")

    @model_validator(mode="after")
    def _drops_before_the_last_seed(self) -> Spec:
        if self.drop and self.drop.seeds >= len(self.seeds):
            given = counted(len(self.seeds), "seed")
            raise ValueError(
                f"drop.seeds: of {given} none is left after the first {self.drop.seeds}, so no arm is dropped; "
                "give fewer there, give more seeds, or leave drop out"
            )
        return self

    @model_validator(mode="after")
    def _holds_time(self) -> Spec:
        if (self.equal == "time") != (self.minutes is not None):
            raise ValueError("`equal: time` and `minutes`, those of each run, go together; give both or none")
        if self.equal != "time":
            return self
        if self.trunks:
            raise ValueError("forks share the steps of their trunk; leave `equal: time` or the trunks out")
        named = [
            name for name, part in {"": self, **self.arms}.items() if {"steps", "schedule_steps"} & set(part.optim)
        ]
        if named:
            where = f"arms.{named[0]}.optim" if named[0] else "optim"
            raise ValueError(f"{where}: the steps follow from `equal: time` and the speed of each arm; leave them out")
        return self

    @model_validator(mode="after")
    def _forks_its_trunks(self) -> Spec:
        begun = {arm.begins: name for name, arm in self.arms.items() if arm.begins}
        for trunk, name in begun.items():
            if trunk not in self.trunks:
                near = did_you_mean(trunk, self.trunks, otherwise="the key trunks describes them; add it")
                raise ValueError(f"arms.{name}.from: there is no trunk {trunk!r}: {near}")
        for trunk in self.trunks:
            if trunk in self.arms:
                raise ValueError(f"trunks.{trunk} has the name of an arm, and so its folder; choose another")
            if trunk not in begun:
                raise ValueError(f"trunks.{trunk}: no arm begins from it; give one `from: {trunk}`")
        return self

    @model_validator(mode="after")
    def _tunes_fairly(self) -> Spec:
        if self.tune is None:
            if own := [name for name, arm in self.arms.items() if arm.grid]:
                raise ValueError(f"arms.{own[0]}.grid is tried only with the key tune, which names the seed; add it")
            return self
        if self.tune.seed in self.seeds:
            raise ValueError(
                f"tune.seed {self.tune.seed} is among the seeds, whose result would then favour what was chosen on it; "
                "choose another"
            )
        counts = {name: len(self.points(name)) for name in self.arms}
        if len(set(counts.values())) > 1:
            words = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"arms are tuned with unequal numbers of runs ({words}); give their grids as many points")
        return self

    def layers(self, arm: str) -> list[Layer]:
        """What an arm changes in the settings of all, its trunk's changes first."""
        own = self.arms[arm]
        return [*([self.trunks[own.begins].layer] if own.begins else []), own.layer]

    def points(self, arm: str) -> list[Point]:
        """The points of the grid of an arm; none without tuning."""
        if self.tune is None:
            return []
        grid = self.arms[arm].grid or self.tune.grid
        return [_point(dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]

    def _require_arm(self, key: str, name: str) -> None:
        """Raises ValueError if there is no arm of this name, which the file gives under `key`."""
        if name not in self.arms:
            raise ValueError(f"{key}: there is no arm {name!r}: {did_you_mean(name, self.arms)}")


def _point(values: dict[str, str | None]) -> Point:
    layer: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        layer.setdefault(section, {})[name] = value
    return Point(", ".join(f"{key}={as_written(value)}" for key, value in values.items()), layer)


def settings(spec: Spec, *changes: Layer) -> Config:
    """The settings of a run: the preset, then those of all arms, then `changes`, the later winning.

    Raises ConfigError.
    """
    merged: dict[str, dict[str, Any]] = {}
    for layer in (_preset(spec.preset), spec.layer, *changes):
        for section, values in layer.items():
            merged.setdefault(section, {}).update(values)
    return parse({"preset": spec.preset, **merged})


@cache
def _preset(name: str) -> Layer:
    """The settings of a preset, whose file is read once for all runs."""
    return read_yaml(preset_file(name))


PARTS: dict[str, type[Part]] = {
    "arms": Arm, "compare": Claim, "drop": Drop, "eval": Evaluation, "tune": Tune, "trunks": Trunk,
}  # fmt: skip


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`below` with the values of `above`, which win; mappings are merged in turn, and all else is taken whole."""
    found = dict(below)
    for key, value in above.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found
