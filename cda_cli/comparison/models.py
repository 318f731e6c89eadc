"""Opens the models of several runs, one after another: their losses on one text, causal checks, and what they read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cda_cli.causal import Effects, Prepared, Wanted, prepare
from cda_cli.comparison.overlap import HeadOverlap, SharesWatcher, head_overlap
from cda_cli.comparison.recorded import RecordedRun, have_one_tokenizer
from cda_cli.data import Batch, loss_of_text
from cda_cli.errors import CheckpointError, ConfigError, DataError
from cda_cli.evaluation import Plan, TextEvaluation, Way, evaluate_readings, open_readings
from cda_cli.evaluation.checkpoints import Reading
from cda_cli.inspection import OF_BUDGET, HeadReport, Report, ReportWatcher, inspect
from cda_cli.inspection.measures import MEASURES
from cda_cli.model import Transformer
from cda_cli.plurals import counted
from cda_cli.restore import Restored, Saved, TextSide
from cda_cli.runs.folder import Run
from cda_cli.signals import StopRequest

FAR = 4  # times the context of training: windows that are longer take so long that this is said first
INSPECTED = 16  # windows of the text, as many as `cda inspect-sparsity` looks at
SHOWN = (*MEASURES, "median_distance", "sink_mass", "sink_rate")  # the measures of which there are means over heads


@dataclass(frozen=True)
class Models:
    """What was measured of the models. `overlaps` are those of the heads of each run with those of the first.

    An overlap is None where the runs do not read the same tokens, or less than two windows of them.
    """

    evaluation: TextEvaluation
    effects: list[Effects]
    reports: list[Report]
    overlaps: list[HeadOverlap | None]
    parameters: list[int]
    have_budget: list[bool]

    @property
    def inspected(self) -> int:
        """Windows in which the attention was looked at."""
        return self.reports[0].windows

    @cached_property
    def attention(self) -> list[dict[str, Any]]:
        """For each run the means of SHOWN over all heads, and as `layers` over those of each layer.

        Those of a budget are NaN where the attention has none.
        """
        return [
            _means(report.heads, has_budget)
            | {"layers": [{"layer": layer, **_means(heads, has_budget)} for layer, heads in _by_layer(report).items()]}
            for report, has_budget in zip(self.reports, self.have_budget, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """The fields of `--json`: those of `cda eval` and, for each run, of its attention."""
        return {
            "evaluation": self.evaluation.as_dict([each.as_dict() for each in self.effects]),
            "parameters": self.parameters,
            "attention": self.attention,
            "head_overlap": [None if each is None else each.as_dict() for each in self.overlaps],
        }


def _by_layer(report: Report) -> dict[int, list[HeadReport]]:
    found: dict[int, list[HeadReport]] = {}
    for head in report.heads:
        found.setdefault(head.layer, []).append(head)
    return found


def _means(heads: Sequence[HeadReport], has_budget: bool) -> dict[str, float]:
    figures = torch.tensor([[head.measures[name] for name in SHOWN] for head in heads], dtype=torch.float64)
    means = dict(zip(SHOWN, figures.nanmean(0).tolist(), strict=True))
    return means if has_budget else means | dict.fromkeys(("sparsity_k", *OF_BUDGET), math.nan)


def open_where_possible(
    runs: Sequence[RecordedRun], plan: Plan, open_text: Callable[[Saved], TextSide], *, best: bool, required: bool
) -> tuple[list[Reading], str]:
    """Opens the newest checkpoints of `runs` and the text, or else returns no reading and why there is none.

    With `required` it raises that instead: CheckpointError, ConfigError or DataError.
    """
    try:
        for run in runs:
            if not Run(run.path).steps():
                raise CheckpointError(f"{run.path} has no checkpoint; train it until it saves, or give --no-eval")
        return open_readings([run.path for run in runs], plan, open_text, best=best), ""
    except (CheckpointError, ConfigError, DataError) as error:
        if required:
            raise
        return [], str(error)


def plan_for(runs: Sequence[RecordedRun], plan: Plan) -> Plan:
    """Returns `plan` with the windows that all runs can read: of the smallest context, and of documents if their
    tokenizers differ.

    Raises ConfigError if that leaves no meaning to a number of batches.
    """
    lengths = {run.config.model.seq_len for run in runs}
    if plan.context is None and len(lengths) > 1:
        plan = replace(plan, context=min(lengths))
    if have_one_tokenizer(runs):
        return plan
    if plan.max_batches is not None:
        raise ConfigError("the runs have different tokenizers and are compared by document; leave --max-batches out")
    return replace(plan, per_document=True)


@dataclass
class _Inspections:
    """Looks at the attention of each model while it is there to be evaluated."""

    readings: Sequence[Reading]
    context: int
    wanted: Wanted
    stop: StopRequest
    reports: list[Report] = field(default_factory=list)
    seen: list[SharesWatcher] = field(default_factory=list)
    prepared: list[Prepared] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    parameters: list[int] = field(default_factory=list)
    have_budget: list[bool] = field(default_factory=list)

    def ways(
        self,
        restored: Restored,
        dtype: torch.dtype,
        open_batches: Callable[[], Iterable[Batch]],
        advance: Callable[[int], None],
    ) -> dict[str, Way]:
        """Looks at the next model, and returns the further ways to measure it that are `wanted`."""
        config, windows = restored.config.model, self.readings[len(self.reports)].windows.take(slice(INSPECTED))
        report, seen = (
            ReportWatcher(config.attn_k),
            SharesWatcher(config.depth * config.heads, self.context, len(windows)),
        )
        for watcher in (report, seen):
            batches = self.stop.until(windows.batches(1))
            inspect(restored.model, batches, restored.device, dtype, watcher, advance)
        self.stop.check("interrupted; nothing was written")
        self.reports.append(report.report())
        self.seen.append(seen)
        self.parameters.append(sum(each.numel() for each in restored.model.parameters()))
        self.have_budget.append(restored.model.attention_rule.has_budget)
        wanted = self._with_meaning(restored.model)
        self.prepared.append(prepare(restored.model, wanted, open_batches, restored.device, dtype, advance))
        return self.prepared[-1].ways(restored.model)

    def _with_meaning(self, model: Transformer) -> Wanted:
        """Leaves out what has no meaning for `model`. Raises ConfigError if it has none for any of the models."""
        kept = []
        for each in self.wanted.interventions:
            try:
                each.require(model)
            except ConfigError:
                self.refused[each.name] += 1
                if self.refused[each.name] == len(self.readings):
                    raise
            else:
                kept.append(each)
        return self.wanted._replace(interventions=kept)


def compare_models(
    plan: Plan,
    readings: Sequence[Reading],
    restore: Callable[[Path], tuple[Restored, torch.dtype]],
    wanted: Wanted,
    stop: StopRequest,
    advance: Callable[[int], None],
) -> Models:
    """Evaluates each of the `readings` as `cda eval` does, and looks at the attention in the first windows of each.

    `advance` gets numbers of windows, `windows_to_read` in all. Raises InterruptedRunError once a stop was asked for.
    """
    inspections = _Inspections(readings, plan.context or readings[0].text.seq_len, wanted, stop)
    evaluation = evaluate_readings(plan, readings, restore, stop, advance, further=inspections.ways)
    measured = zip(inspections.prepared, evaluation.sums, evaluation.units, strict=True)
    effects = [prepared.effects(sums, units, None) for prepared, sums, units in measured]
    first, heads = inspections.seen[0], [reading.saved.config.model.heads for reading in readings]
    is_same = [reading.saved.tokenizer.fingerprint == readings[0].saved.tokenizer.fingerprint for reading in readings]
    overlaps = [
        head_overlap(first, seen, (heads[0], count)) if same else None
        for seen, count, same in list(zip(inspections.seen, heads, is_same, strict=True))[1:]
    ]
    return Models(evaluation, effects, inspections.reports, overlaps, inspections.parameters, inspections.have_budget)


def remarks(plan: Plan, readings: Sequence[Reading]) -> list[str]:
    """What is to be said before anything is read: of the text, and of windows far longer than those of training."""
    said = loss_of_text(readings[0].text.sides)
    found = [said] if said else []
    trained = min(each.saved.config.model.seq_len for each in readings)
    if plan.context is not None and plan.context >= FAR * trained:
        windows = counted(sum(len(each.windows) for each in readings), "window")
        found.append(
            f"{windows} of {plan.context:,} tokens, {plan.context // trained} times as many as in training: attention "
            "to each token takes as many times as long; --max-batches reads less"
        )
    return found


def windows_to_read(readings: Sequence[Reading], wanted: Wanted) -> int:
    """The windows that `compare_models` reads, each time that it reads one."""
    return sum(
        len(each.windows) * (1 + wanted.passes(each.saved.config.model)) + 2 * min(INSPECTED, len(each.windows))
        for each in readings
    )
