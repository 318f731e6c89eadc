"""Effects: how far each intervention raises the loss, on the same windows, with paired intervals.

Shapes: W windows, U observations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cda_cli.causal.cuts import Cut, UnitCut
from cda_cli.causal.heads import HeadAblation, rank_correlation
from cda_cli.causal.interventions import Intervention
from cda_cli.evaluation import Comparison, Estimate, Evaluation, Units


class Effect(NamedTuple):
    """What is measured under an intervention, and how far its bits per byte are above those of the model as it is.

    `predicted` is the difference that a derivative foretells, and `unpredicted` how far the measured one is above that.
    """

    intervention: Intervention
    evaluation: Evaluation
    difference: Estimate
    predicted: Estimate | None = None
    unpredicted: Estimate | None = None

    def as_dict(self) -> dict[str, Any]:
        """Its figures, by the names in JSON."""
        found = {"name": self.intervention.name, **self.intervention.figures()}
        for name in ("difference", "predicted", "unpredicted"):
            if estimate := getattr(self, name):
                found |= estimate.as_dict(name)
        return {**found, **self.evaluation._asdict()}


class HeldOut(NamedTuple):
    """How many keys or units suffice, chosen on one half of the observations and measured on the other.

    `kept` is the smallest number of the series `choice` whose difference on the first half is at most `tolerance` with
    its whole interval, and None if there is none. `chosen_on` and `difference` are the differences on the two halves,
    and `unit` says what an observation is.
    """

    choice: str
    unit: str
    tolerance: float
    kept: int | None
    chosen_on: Estimate | None
    difference: Estimate | None

    def as_dict(self) -> dict[str, Any]:
        found = {"name": f"held-out[{self.choice}]", "tolerance": self.tolerance, "kept": self.kept}
        for name in ("chosen_on", "difference"):
            found |= (getattr(self, name) or Estimate(*[math.nan] * 4)).as_dict(name)
        return found


class Effects(NamedTuple):
    """The model as it is, which is way 0 of `comparison`, and the effect of each intervention.

    `held_out` is empty unless a tolerance is given.
    """

    comparison: Comparison
    effects: list[Effect]
    held_out: list[HeldOut]

    def as_dict(self) -> dict[str, Any]:
        """The figures of interventions, by the names in JSON."""
        found: dict[str, Any] = {}
        for effect in self.effects:
            found.setdefault(effect.intervention.kind, []).append(effect.as_dict())
        if correlations := self.rank_correlations():
            found["rank_correlations"] = correlations
        if self.held_out:
            found["held_out"] = [one.as_dict() for one in self.held_out]
        return found

    def rank_correlations(self) -> dict[str, float]:
        """Spearman's rank correlation between each measure of a head and the loss that its ablation alone costs."""
        single = [
            (each.intervention, each.difference) for each in self.effects if isinstance(each.intervention, HeadAblation)
        ]
        costs = torch.tensor([difference.value for head, difference in single if head.measured])
        measured = [head.measured for head, _ in single if head.measured]
        if not measured:
            return {}
        return {name: rank_correlation(torch.tensor([each[name] for each in measured]), costs) for name in measured[0]}


def choose_held_out(comparison: Comparison, effects: Sequence[Effect], tolerance: float) -> list[HeldOut]:
    """Chooses on every other observation how many keys or units suffice, and measures it on the rest.

    Way 0 of `comparison` is the model as it is, and the ways of `effects` follow.
    """
    first, other = (half(comparison, parity) for parity in (0, 1))
    series: dict[str, list[tuple[int, int]]] = {}
    for way, effect in enumerate(effects, start=1):
        if isinstance(effect.intervention, (Cut, UnitCut)):
            series.setdefault(effect.intervention.series, []).append((effect.intervention.kept, way))
    return [_chosen(choice, sorted(ways), tolerance, first, other) for choice, ways in series.items()]


def _chosen(
    choice: str, ways: list[tuple[int, int]], tolerance: float, first: Comparison, other: Comparison
) -> HeldOut:
    for kept, way in ways:
        chosen_on = first.difference(way)
        if chosen_on.high <= tolerance:
            return HeldOut(choice, first.units.name, tolerance, kept, chosen_on, other.difference(way))
    return HeldOut(choice, first.units.name, tolerance, None, None, None)


def half(comparison: Comparison, parity: int) -> Comparison:
    """Returns the comparison over every other observation."""
    ways = [way.take(slice(parity, None, 2)) for way in comparison.ways]
    units = comparison.units
    return Comparison(ways, Units(torch.arange(len(ways[0])), units.name, units.block))
