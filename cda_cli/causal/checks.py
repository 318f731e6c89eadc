"""Causal checks of one or several checkpoints: what is asked for, what that needs of the text, and what comes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.causal.cuts import LONGEST_CURVE, TOP, Cut, parse_cuts
from cda_cli.causal.effects import Effect, Effects, choose_held_out
from cda_cli.causal.heads import ablations, count_ablations, measure_heads, parse_ablations
from cda_cli.causal.interventions import Intervention, doubled
from cda_cli.causal.substitutes import GATE, Gate, ScaledBudget, parse_substitutes
from cda_cli.config import ModelConfig
from cda_cli.data import Batch
from cda_cli.errors import ConfigError
from cda_cli.evaluation import (
    AS_IT_IS,
    Comparison,
    Sums,
    TextEvaluation,
    Units,
    Way,
    joined,
    measure,
    windows_as_units,
)
from cda_cli.inspection import gradients
from cda_cli.model import Transformer
from cda_cli.restore import Restored

SELECTION = (TOP, "recent", "distance-matched", "random")  # the keys with the largest weights, and their controls
TOLERANCE = 0.01  # bits per byte: what keys may cost that suffice


class Wanted(NamedTuple):
    """What to measure of a model: interventions, and orders in which to ablate its heads (None: each by itself)."""

    interventions: list[Intervention]
    head_orders: list[str | None]

    @classmethod
    def parse(cls, cuts: Sequence[str], substitutes: Sequence[str], ablated: Sequence[str]) -> Wanted:
        """Reads what a command line asks for. Raises ConfigError for what it does not know."""
        return cls([*parse_cuts(cuts), *parse_substitutes(substitutes)], parse_ablations(ablated))

    @classmethod
    def of_selection(cls, model: Transformer) -> Wanted:
        """What says whether the keys that a model selects matter: cuts with their controls, and the gate control."""
        # As many keys as a window has would leave out none, and cost nothing.
        fewer = [keys for keys in doubled(1, LONGEST_CURVE) if keys < model.config.seq_len] or [1]
        numbers = ",".join(map(str, fewer))
        gate = [GATE] if model.attention_rule.has_budget else []
        return cls.parse([f"{choice}:{numbers}" for choice in SELECTION], gate, [])

    def require_cuts(self, option: str) -> None:
        """Raises ConfigError if there are no cuts of keys, of which `option` needs several."""
        if not any(isinstance(each, Cut) for each in self.interventions):
            raise ConfigError(f"{option} compares cuts; add some, such as --cut top:1..64 --cut recent:1..64")

    @property
    def predicts(self) -> bool:
        """Whether the effect of one is also predicted from a derivative."""
        return any(isinstance(each, ScaledBudget) for each in self.interventions)

    @property
    def counts_gates(self) -> bool:
        """Whether the gate-equivalent rows are counted."""
        return any(isinstance(each, Gate) for each in self.interventions)

    def passes(self, config: ModelConfig) -> int:
        """Counts the passes over the text that they take, of a model as `config` describes it."""
        heads = count_ablations(self.head_orders, config.depth * config.heads)
        first = 2 * bool(self.head_orders) + self.predicts + self.counts_gates
        return len(self.interventions) + heads + first


class Prepared(NamedTuple):
    """Interventions that are ready for a model, and Σ k·∂L/∂k of each window [W], nats, to predict an effect."""

    interventions: list[Intervention]
    budget_gradient: Tensor | None

    def ways(self, model: Transformer) -> dict[str, Way]:
        """Returns the ways to measure the model, one for each intervention, by their names."""
        return {each.name: partial(each.applied, model) for each in self.interventions}

    def effects(self, sums: Sequence[Sums], units: Units, tolerance: float | None) -> Effects:
        """Compares the sums of the model as it is, the first, with those of each of `ways`."""
        scaled = [each for each in self.interventions if isinstance(each, ScaledBudget)]
        comparison = Comparison([*sums, *(self._predicted(sums[0], each) for each in scaled)], units)
        predictions = dict(zip(map(id, scaled), range(len(sums), len(sums) + len(scaled)), strict=True))
        effects = []
        for way, each in enumerate(self.interventions, start=1):
            effect = Effect(each, comparison.evaluation(way), comparison.difference(way))
            if (other := predictions.get(id(each))) is not None:
                predicted, residual = comparison.difference(other), comparison.difference(way, other)
                effect = effect._replace(predicted=predicted, residual=residual)
            effects.append(effect)
        held_out, controls = ([], []) if tolerance is None else choose_held_out(comparison, effects, tolerance)
        return Effects(comparison, effects, held_out, controls)

    def _predicted(self, whole: Sums, scaled: ScaledBudget) -> Sums:
        assert self.budget_gradient is not None
        return replace(whole, nats=whole.nats + (scaled.factor - 1) * self.budget_gradient)


def prepare(
    model: Transformer,
    wanted: Wanted,
    open_batches: Callable[[], Iterable[Batch]],
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda windows: None,
) -> Prepared:
    """Makes the interventions that are `wanted`, and measures what these need of the text.

    Raises ConfigError if one has no meaning for the model. `advance` gets the windows of each batch in each pass.
    """
    unique = {each.name: each for each in wanted.interventions}
    ready = copy.deepcopy(list(unique.values()))  # What one holds belongs to this model.
    for each in ready:
        each.require(model)
    for each in ready:
        if isinstance(each, Gate):
            each.count(model, open_batches(), device, dtype, advance)
    if wanted.head_orders:
        statistics = measure_heads(model, open_batches, device, dtype, advance)
        ready += ablations(list(dict.fromkeys(wanted.head_orders)), statistics)
    gradient = gradients(model, open_batches(), device, dtype, advance).budget if wanted.predicts else None
    return Prepared(ready, gradient)


def check_text(
    model: Transformer,
    wanted: Wanted,
    open_batches: Callable[[], Iterable[Batch]],
    device: torch.device,
    dtype: torch.dtype,
    tolerance: float | None = None,
    advance: Callable[[int], None] = lambda windows: None,
) -> Effects:
    """Measures what is `wanted` of a model in memory, on the windows that `open_batches` gives in each pass.

    Each window is an observation. Raises ConfigError if an intervention has no meaning for the model.
    """
    prepared = prepare(model, wanted, open_batches, device, dtype, advance)
    ways = [AS_IT_IS, *prepared.ways(model).values()]
    sums = joined(measure(model, open_batches(), device, dtype, ways, advance))
    return prepared.effects(sums, windows_as_units(len(sums[0])), tolerance)


class Checks:
    """The checks that are `wanted` of checkpoints, which `evaluate_readings` measures one after another."""

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.prepared: list[Prepared] = []

    def ways(
        self,
        restored: Restored,
        dtype: torch.dtype,
        open_batches: Callable[[], Iterable[Batch]],
        advance: Callable[[int], None],
    ) -> dict[str, Way]:
        """Returns the further ways to measure the next checkpoint, by their names."""
        model, device = restored.model, restored.device
        self.prepared.append(prepare(model, self.wanted, open_batches, device, dtype, advance))
        return self.prepared[-1].ways(model)

    def effects(self, result: TextEvaluation, tolerance: float | None) -> list[Effects]:
        """Returns the effects for each checkpoint of `result`, with a held-out choice if there is a `tolerance`."""
        measured = zip(self.prepared, result.sums, result.units, strict=True)
        return [prepared.effects(sums, units, tolerance) for prepared, sums, units in measured]
