"""A sparsity report: a verdict, a table of heads, a map of all heads by one measure, and the weights of one head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cda_cli.console.base import is_coloured, out, print_pairs, share, table
from cda_cli.console.effects import show_selection
from cda_cli.console.head_grid import head_grid
from cda_cli.console.heat_map import heat_map
from cda_cli.console.text import print_sentence, section
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from cda_cli.causal import Effects
    from cda_cli.inspection import HeadReport, Report
    from cda_cli.restore import Restored, TextSide

TYPICAL_SHARE, TYPICAL_LIFT = 0.2, 2.0  # A head is named after a pattern with so much of its mass, and so much lift.
HEAD_TYPES = ("induction", "duplicate", "previous", "self", "first")
SINK_RATE = 0.5  # of the windows: a head with a sink in more of them rests on one
DASH = "–"


def show_report(
    report: Report,
    restored: Restored,
    text: TextSide,
    by: str,
    drawn: tuple[int, int],
    weights: Tensor,
    checked: Effects | None = None,
) -> None:
    """Shows a report, and what was `checked` by changing the model on the same text.

    `by` is the measure of the map; `drawn` is the layer and head that have the weights [T, S].
    """
    console, has_budget = out(), restored.model.attention_rule.has_budget
    data = f"{text.description}, {text.split}"
    tokens = f"{report.tokens:,} in {counted(report.windows, 'window')}"
    print_pairs(console, {"checkpoint": str(restored.path), "data": data, "tokens": tokens})
    console.print()
    for sentence in verdict(report, has_budget, checked):
        print_sentence(console, sentence)
    if checked:
        show_selection(checked, console.width)
    described = [_head_columns(head, has_budget) for head in report.heads]
    heads = table("head", *described[0])
    for head, columns in zip(report.heads, described, strict=True):
        heads.add_row(f"{head.layer}.{head.head}", *columns.values())
    section(f"Attention: {restored.model.attention_description}", heads)
    _show_map(report, by, console)
    units = table("layer", "units", "for 99%", "p95", "dead", "always on", "overlap", "by chance", "massive")
    for each in report.layers:
        unit = each.units
        units.add_row(
            str(each.layer),
            str(unit.units),
            f"{unit.units_99:.1f}",
            f"{unit.units_99_p95:.0f}",
            str(unit.dead_units),
            str(unit.always_on_units),
            _share(unit.neighbour_overlap),
            _share(unit.chance_overlap),
            f"{each.residual.massive_activations:.1f}",
        )
    section(f"Feed-forward: {restored.config.model.ff}", units)
    ids = [int(token) for token in text.sides[0].ids[: len(weights)]]
    labels = [restored.tokenizer.decode([token]) for token in ids]
    picture = heat_map(weights.tolist(), labels, console.width)
    section(f"Layer {drawn[0]}, head {drawn[1]}: queries down, keys across", picture)


def verdict(report: Report, has_budget: bool, checked: Effects | None = None) -> list[str]:
    """Sentences with figures: how many keys hold a row, what the budget does, and where the rest goes.

    What was checked comes first, and the gate control says of the budget what the measures alone would say.
    """
    measured = [
        _concentrated(report),
        *([] if checked and checked.gates else [_budget(report, has_budget)]),
        _rest(report),
    ]
    return [*(checked.verdict() if checked else []), *measured]


def _concentrated(report: Report) -> str:
    keys = sorted(report.heads, key=lambda head: head.measures["keys_95"])
    mean, rest = (sum(head.measures[name] for head in keys) / len(keys) for name in ("keys_95", "rest_64"))
    spread = f", from {_keys(keys[0])} to {_keys(keys[-1])}" if len(keys) > 1 else ""
    return f"95% of the mass of a row is on {mean:.1f} keys on average{spread}; the largest 64 leave {rest:.1%}."


def _budget(report: Report, has_budget: bool) -> str:
    gates = [head.measures["gate_equivalent"] for head in report.heads]
    gated = [share for share in gates if not math.isnan(share)]
    if not has_budget:
        return "Rows sum to 1, without a budget and without caps."
    if not gated:
        return "No row sees more keys than its budget k, so every key is capped."
    return f"{sum(gated) / len(gated):.1%} of the rows that see more than k keys cap none: they are k times a softmax."


def _rest(report: Report) -> str:
    heads, layers = report.heads, report.layers
    sinks = sum(head.measures["sink_rate"] > SINK_RATE for head in heads)
    rested = f"{sinks} of {counted(len(heads), 'head')} {'rests' if sinks == 1 else 'rest'} on a sink"
    seen = [each.units for each in layers if each.units.units]  # not those of experts
    if not seen:
        return f"{rested}."
    used = sum(unit.units_99 / unit.units for unit in seen) / len(seen)
    dead = sum(unit.dead_units for unit in seen)
    units = f"{used:.1%} of the units make 99% of what the feed-forward adds, and {counted(dead, 'unit')} never did"
    return f"{rested}; {units}."


def _keys(head: HeadReport) -> str:
    return f"{head.measures['keys_95']:.1f} (head {head.layer}.{head.head})"


def _head_columns(head: HeadReport, has_budget: bool) -> dict[str, str]:
    """The columns of a head. Without a budget every row sums to 1, and what is measured against k means nothing."""
    measures = head.measures
    of_budget = {"capped/k": _share(measures["capped_share"]), "gated": _share(measures["gate_equivalent"])}
    return {
        **({"k": f"{measures['sparsity_k']:.3f}"} if has_budget else {}),
        "support": f"{measures['effective_support']:.2f}",
        "keys 95%": f"{measures['keys_95']:.1f}",
        **(of_budget if has_budget else {}),
        "sink": _share(measures["sink_mass"]),
        "distance": f"{measures['median_distance']:.0f}",
        "reads": head_type(head) or DASH,
    }


def head_type(head: HeadReport) -> str | None:
    """The pattern of keys that a head reads most beyond chance, if any (docs/inspection.md)."""
    lifts = {
        name: head.measures[f"{name}_lift"]
        for name in HEAD_TYPES
        if head.measures[f"{name}_share"] >= TYPICAL_SHARE and head.measures[f"{name}_lift"] >= TYPICAL_LIFT
    }
    return max(lifts, key=lambda name: lifts[name]) if lifts else None


def _show_map(report: Report, by: str, console: Console) -> None:
    figures: dict[int, dict[int, float]] = {}
    for head in report.heads:
        figures.setdefault(head.layer, {})[head.head] = head.measures[by]
    heads = list(next(iter(figures.values())))
    rows = [list(row.values()) for row in figures.values()]
    grid = head_grid(list(figures), heads, rows, console.width, is_coloured(console))
    section(f"{by}: layers down, heads across", grid)


def _share(value: float) -> str:
    return DASH if math.isnan(value) else share(value)
