"""Results of causal checks: what each intervention does to the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from cda_cli.console.base import table
from cda_cli.console.evaluation import difference_columns
from cda_cli.console.text import section

if TYPE_CHECKING:
    from cda_cli.causal import Effect, Effects, HeldOut

TITLES = {
    "cuts": "Cuts: keys read",
    "unit_cuts": "Cuts: feed-forward units kept",
    "substitutes": "Attention computed in another way",
    "ablations": "Heads replaced by their mean output, one at a time",
    "cumulative_ablations": "Heads replaced by their mean output, the smallest of a measure first",
}


def show_effects(effects: Sequence[Effects]) -> None:
    """Shows a table for each kind of intervention and checkpoint, of differences from the checkpoint as it is."""
    for number, found in enumerate(effects, start=1):
        of = f" (checkpoint {number})" if len(effects) > 1 else ""
        for kind, title in TITLES.items():
            if chosen := [effect for effect in found.effects if effect.intervention.kind == kind]:
                section(f"{title}{of}", _table(chosen))
        if correlations := found.rank_correlations():
            section(f"Rank correlation of each measure with the difference{of}", _correlations(correlations))
        if found.held_out:
            tolerance, unit = found.held_out[0].tolerance, found.held_out[0].unit
            title = f"The fewest within {tolerance:g} bits per byte, chosen on half of the {unit}{of}"
            section(title, _held_out(found.held_out))


def _table(effects: Sequence[Effect]) -> Table:
    shown = [_predicted(one) | one.intervention.columns() for one in effects]
    further = list(dict.fromkeys(name for columns in shown for name in columns))
    rows = table("", "bits per byte", "difference", "95 % interval", *further)
    for one, columns in zip(effects, shown, strict=True):
        found = [f"{one.evaluation.bits_per_byte:.4f}", *difference_columns(one.difference)]
        rows.add_row(one.intervention.description, *found, *(columns.get(name, "") for name in further))
    return rows


def _predicted(effect: Effect) -> dict[str, str]:
    return {"predicted": f"{effect.predicted.value:+.4f}"} if effect.predicted else {}


def _correlations(correlations: Mapping[str, float]) -> Table:
    rows = table("measure", "Spearman's ρ")
    for name, rho in correlations.items():
        rows.add_row(name, "–" if math.isnan(rho) else f"{rho:+.2f}")
    return rows


def _held_out(held_out: Sequence[HeldOut]) -> Table:
    rows = table("choice", "kept", "difference there", "on the other half", "95 % interval")
    for one in held_out:
        if one.chosen_on is None or one.difference is None:
            rows.add_row(one.choice, "none")
        else:
            rows.add_row(one.choice, str(one.kept), f"{one.chosen_on.value:+.4f}", *difference_columns(one.difference))
    return rows
