"""A sparsity report: a verdict, a table of heads, a map of all heads by one measure, and the weights of one head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cda_cli.console.base import is_coloured, out, print_pairs, share, table
from cda_cli.console.effects import show_selection
from cda_cli.console.head_grid import head_grid
from cda_cli.console.heat_map import heat_map
from cda_cli.console.text import print_sentence, section

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from cda_cli.causal import Examined
    from cda_cli.inspection import HeadReport, Report
    from cda_cli.restore import Restored, TextSide

DASH = "–"


def show_report(
    examined: Examined, restored: Restored, text: TextSide, by: str, drawn: tuple[int, int], weights: Tensor
) -> None:
    """Shows what was `examined` of a model on a text.

    `by` is the measure of the map; `drawn` is the layer and head that have the weights [T, S].
    """
    console, report, has_budget = out(), examined.report, examined.has_budget
    data = f"{text.description}, {text.split}"
    print_pairs(console, {"checkpoint": str(restored.path), "data": data, "inspected": report.extent})
    console.print()
    for sentence in examined.verdict:
        print_sentence(console, sentence)
    if examined.effects:
        show_selection(examined.effects, console.width)
    described = [_head_columns(head, has_budget) for head in report.heads]
    heads = table("head", *described[0])
    for head, columns in zip(report.heads, described, strict=True):
        heads.add_row(f"{head.layer}.{head.head}", *columns.values())
    section(f"Attention: {restored.model.attention_description}", heads)
    _show_map(report, by, console)
    units = table("layer", "units", "for 99%", "p95", "dead", "always on", "overlap", "by chance", "massive")
    blocks = table("layer", "blocks", "active", "dead")
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
        if unit.blocks:
            blocks.add_row(str(each.layer), str(unit.blocks), f"{unit.active_blocks:.1f}", str(unit.dead_blocks))
    section(f"Feed-forward: {restored.config.model.ff}", units)
    if blocks.rows:
        section("Feed-forward: blocks of units", blocks)
    ids = [int(token) for token in text.sides[0].ids[: len(weights)]]
    labels = [restored.tokenizer.decode([token]) for token in ids]
    picture = heat_map(weights.tolist(), labels, console.width)
    section(f"Layer {drawn[0]}, head {drawn[1]}: queries down, keys across", picture)


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
        "reads": head.reads or DASH,
    }


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
