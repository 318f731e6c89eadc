"""Results of causal checks: what each intervention does to the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from cda_cli.console.base import out, print_trimmed, table
from cda_cli.console.cut_chart import cut_chart
from cda_cli.console.evaluation import difference_columns
from cda_cli.console.text import section
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from cda_cli.causal import Effect, Effects, HeldOut
    from cda_cli.evaluation import Estimate

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
            _show_kind(found, kind, f"{title}{of}")
        _show_choices(found, of)


def show_selection(found: Effects, width: int) -> None:
    """Shows the loss against the keys kept as a chart, with the figures below it, and the other effects as tables."""
    curves = {name: {n: one.difference for n, one in curve.items()} for name, curve in found.curves().items()}
    if curves:
        _show_curves(curves, width)
    for kind, title in TITLES.items():
        if kind != "cuts":
            _show_kind(found, kind, title)
    _show_choices(found)


def _show_curves(curves: Mapping[str, Mapping[int, Estimate]], width: int) -> None:
    console = out()
    section("Loss against keys kept: bits per byte more than with all keys", cut_chart(curves, width))
    rows = table("keys", *curves)
    for keys in sorted({keys for curve in curves.values() for keys in curve}):
        rows.add_row(str(keys), *(with_error(curve[keys]) if keys in curve else "" for curve in curves.values()))
    console.print()
    print_trimmed(console, rows)


def _show_kind(found: Effects, kind: str, title: str) -> None:
    if chosen := [effect for effect in found.effects if effect.intervention.kind == kind]:
        section(title, _table(chosen))


def _show_choices(found: Effects, of: str = "") -> None:
    """Shows what follows from the effects of several interventions."""
    if correlations := found.rank_correlations():
        section(f"Rank correlation of each measure with the difference{of}", _correlations(correlations))
    if found.held_out:
        tolerance, unit = found.held_out[0].tolerance, found.held_out[0].unit
        title = f"The fewest within {tolerance:g} bits per byte, chosen on half of the {unit}{of}"
        section(title, _held_out(found.held_out))
    if found.controls:
        kept = found.controls[0].kept
        section(
            f"Other choices of {counted(kept, 'key')} beside the top {kept}, on the other half{of}", _controls(found)
        )


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


def _controls(found: Effects) -> Table:
    rows = table("choice", "difference", "95 % interval")
    for control in found.controls:
        rows.add_row(control.choice, *difference_columns(control.difference))
    return rows


def with_error(difference: Estimate) -> str:
    """A difference and its standard error, if it has one."""
    value, error, *_ = difference
    return f"{value:+.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def _held_out(held_out: Sequence[HeldOut]) -> Table:
    rows = table("choice", "kept", "difference there", "on the other half", "95 % interval")
    for one in held_out:
        if one.chosen_on is None or one.difference is None:
            rows.add_row(one.choice, "none")
        else:
            rows.add_row(one.choice, str(one.kept), f"{one.chosen_on.value:+.4f}", *difference_columns(one.difference))
    return rows
