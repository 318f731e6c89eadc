"""Effects: how far each intervention raises the loss, on the same windows, with paired intervals.

Shapes: W windows, U observations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from cda_cli.causal.cuts import TOP, Cut, UnitCut
from cda_cli.causal.heads import HeadAblation, rank_correlation
from cda_cli.causal.interventions import Intervention
from cda_cli.causal.substitutes import Gate
from cda_cli.evaluation import Comparison, Estimate, Evaluation, Units
from cda_cli.plurals import counted

Of = TypeVar("Of", bound=Intervention)

# The other choices of keys, in words, with their number.
CONTROLS = {
    "recent": "a window of the latest {}",
    "sink": "a window of {} with the first key",
    "distance-matched": "a choice of {} by distance alone",
    "random": "a random choice of {}",
    "other-head": "another head's choice of {}",
}


class Effect(NamedTuple):
    """What is measured under an intervention, and how far its bits per byte are above those of the model as it is.

    `predicted` is the difference that a derivative predicts, and `residual` is the measured one minus that.
    """

    intervention: Intervention
    evaluation: Evaluation
    difference: Estimate
    predicted: Estimate | None = None
    residual: Estimate | None = None

    def as_dict(self) -> dict[str, Any]:
        """Its figures, by the names in JSON."""
        found = {"name": self.intervention.name, **self.intervention.fields()}
        for name in ("difference", "predicted", "residual"):
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


class Control(NamedTuple):
    """Another choice of as many keys as suffice of those with the largest weights, `kept`.

    `difference` is how far its bits per byte are above those with the keys of the largest weights, on the half of the
    observations on which the number was not chosen.
    """

    choice: str
    kept: int
    tolerance: float
    difference: Estimate

    @property
    def words(self) -> str:
        """How it does, in words that claim no more than both the interval and the standard error allow.

        The interval alone is too narrow for few windows.
        """
        value, error, low, high = self.difference
        if max(high, value + 2 * error) <= self.tolerance:
            how = "does as well"
        elif min(low, value - 2 * error) > self.tolerance:
            how = "does worse"
        else:
            how = "may do as well or worse"
        return f"{CONTROLS[self.choice].format(self.kept)} {how} ({_words(self.difference)} beside them)"

    def as_dict(self) -> dict[str, Any]:
        return {"name": f"control[{self.choice}]", "kept": self.kept, **self.difference.as_dict("difference")}


class Effects(NamedTuple):
    """The model as it is, which is way 0 of `comparison`, and the effect of each intervention.

    `held_out` is empty unless a tolerance is given, and `controls` unless some number of the largest weights suffices.
    """

    comparison: Comparison
    effects: list[Effect]
    held_out: list[HeldOut]
    controls: list[Control]

    def of(self, kind: type[Of]) -> list[tuple[Of, Effect]]:
        """The interventions of a type, each with its effect."""
        return [(each.intervention, each) for each in self.effects if isinstance(each.intervention, kind)]

    def curves(self) -> dict[str, dict[int, Effect]]:
        """The effect of each cut of keys, by its series and its number of keys, the numbers in order."""
        series: dict[str, dict[int, Effect]] = {}
        for cut, effect in sorted(self.of(Cut), key=lambda each: each[0].keys):
            series.setdefault(cut.series, {})[cut.keys] = effect
        return series

    def single_heads(self) -> list[tuple[HeadAblation, Effect]]:
        """The ablation of each head by itself, and its effect."""
        return [(head, effect) for head, effect in self.of(HeadAblation) if head.measured]

    @property
    def gates(self) -> list[tuple[Gate, Effect]]:
        """The gate control, if it was measured and some row sees more keys than its k."""
        return [(gate, effect) for gate, effect in self.of(Gate) if not math.isnan(gate.equivalent_share)]

    def verdict(self) -> list[str]:
        """Sentences on how few keys suffice, on its controls, and on the gate control, where they were measured."""
        sentences = [words for top in self.held_out if top.choice == TOP for words in self._on_keys(top)]
        for gate, effect in self.gates:
            sentences.append(
                f"{gate.equivalent_share:.1%} of the rows that see more than k keys are a softmax times a gate k; "
                f"to make all of them so costs {_words(effect.difference)} bits per byte."
            )
        return sentences

    def _on_keys(self, top: HeldOut) -> list[str]:
        if top.kept is None or top.difference is None:
            cuts = {keys: effect.difference for keys, effect in self.curves()[TOP].items()}
            within = [keys for keys, found in cuts.items() if found.value + 2 * _known(found.error) <= top.tolerance]
            keys = within[0] if within else max(cuts)
            cost = f"{counted(keys, 'key')} cost {_words(cuts[keys])} bits per byte"
            if within:
                windows = counted(len(self.comparison.ways[0]), "window is", "windows are")
                return [f"{windows} too few to say how many keys suffice; here {cost}."]
            return [f"No number of keys that was tried is sure to cost at most {top.tolerance:g}: even {cost}."]
        value, error, _, high = top.difference
        cost = f"{_words(top.difference)} bits per byte"
        if max(high, value + 2 * _known(error)) <= top.tolerance:
            suffice = f"{counted(top.kept, 'key suffices', 'keys suffice')}: {cost}."
        else:
            suffice = (
                f"{counted(top.kept, 'key suffices', 'keys suffice')} on half of the {top.unit}; on the rest "
                f"the cost is {cost}, which is not sure to be {top.tolerance:g} or less."
            )
        controls = "; ".join(control.words for control in self.controls)
        return [suffice, *([f"{controls[0].upper()}{controls[1:]}."] if controls else [])]

    def as_dict(self) -> dict[str, Any]:
        """The figures of interventions, by the names in JSON."""
        found: dict[str, Any] = {}
        for effect in self.effects:
            found.setdefault(effect.intervention.kind, []).append(effect.as_dict())
        if correlations := self.rank_correlations():
            found["rank_correlations"] = correlations
        if self.held_out:
            found["held_out"] = [one.as_dict() for one in self.held_out]
        if self.controls:
            found["controls"] = [one.as_dict() for one in self.controls]
        return found

    def document(self) -> dict[str, Any]:
        """The figures of the model as it is, and those of interventions, by the names in JSON."""
        return {**self.comparison.evaluation()._asdict(), **self.as_dict()}

    def rank_correlations(self) -> dict[str, float]:
        """Spearman's rank correlation between each measure of a head and the loss that its ablation alone costs."""
        measured = [head.measured for head, _ in self.single_heads()]
        costs = torch.tensor([effect.difference.value for _, effect in self.single_heads()])
        if not measured:
            return {}
        return {name: rank_correlation(torch.tensor([each[name] for each in measured]), costs) for name in measured[0]}


def choose_held_out(
    comparison: Comparison, effects: Sequence[Effect], tolerance: float
) -> tuple[list[HeldOut], list[Control]]:
    """Chooses on every other observation how many keys or units suffice, and measures it on the rest.

    Way 0 of `comparison` is the model as it is, and the ways of `effects` follow. The controls are the other choices of
    as many keys as suffice of those with the largest weights. One observation has no half: then nothing suffices.
    """
    series: dict[str, dict[int, int]] = {}
    for way, effect in enumerate(effects, start=1):
        if isinstance(effect.intervention, (Cut, UnitCut)):
            series.setdefault(effect.intervention.series, {})[effect.intervention.kept] = way
    if len(comparison.ways[0]) < 2:
        return [HeldOut(choice, comparison.units.name, tolerance, None, None, None) for choice in series], []
    first, other = (half(comparison, parity) for parity in (0, 1))
    chosen = {choice: _chosen(choice, sorted(ways.items()), tolerance, first, other) for choice, ways in series.items()}
    kept = chosen[TOP].kept if TOP in chosen else None
    if kept is None:
        return list(chosen.values()), []
    controls = [
        Control(choice, kept, tolerance, other.difference(ways[kept], series[TOP][kept]))
        for choice, ways in series.items()
        if choice in CONTROLS and kept in ways
    ]
    return list(chosen.values()), controls


def _chosen(
    choice: str, ways: list[tuple[int, int]], tolerance: float, first: Comparison, other: Comparison
) -> HeldOut:
    for kept, way in ways:
        chosen_on = first.difference(way)
        if chosen_on.high <= tolerance:
            return HeldOut(choice, first.units.name, tolerance, kept, chosen_on, other.difference(way))
    return HeldOut(choice, first.units.name, tolerance, None, None, None)


def _known(error: float) -> float:
    """A standard error, or 0 where a single observation leaves none."""
    return 0.0 if math.isnan(error) else error


def _words(estimate: Estimate) -> str:
    """A difference with its standard error, if it has one."""
    value, error, *_ = estimate
    return f"{round(value, 3) + 0.0:+.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def half(comparison: Comparison, parity: int) -> Comparison:
    """Returns the comparison over every other observation."""
    ways = [way.take(slice(parity, None, 2)) for way in comparison.ways]
    units = comparison.units
    return Comparison(ways, Units(torch.arange(len(ways[0])), units.name, units.block))
