"""The figure of head ablations: what a measure of a head says of the loss that its ablation costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from cda_cli.causal import rank_correlation
from cda_cli.figures.csv_rows import grouped
from cda_cli.figures.labels import LABELS
from cda_cli.figures.material import Material
from cda_cli.plots import Style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 2


class Ablated(NamedTuple):
    """A measure of a head, and the bits per byte that it costs to replace its output by the mean."""

    measure: str
    layer: int
    head: int
    value: float
    difference: float
    error: float


def ablated_rows(material: Material) -> list[Ablated]:
    heads = material.examined.effects.single_heads() if material.examined.effects else []
    return [
        Ablated(name, ablation.place["layer"], ablation.place["head"], value, *effect.difference[:2])
        for name in (heads[0][0].measured if heads else ())
        for ablation, effect in heads
        for value in [ablation.measured[name]]
    ]


def draw_ablated(style: Style, rows: Sequence[Ablated]) -> Figure:
    measures = grouped(rows, lambda row: row.measure)
    lines = math.ceil(len(measures) / COLUMNS)
    figure, all_axes = new_figure(style, 1, 0.34 * lines, lines, COLUMNS)
    for axes, (measure, of) in zip(all_axes, measures.items(), strict=False):
        x, y = [row.value for row in of], [row.difference for row in of]
        errors = [0.0 if math.isnan(row.error) else row.error for row in of]
        axes.axhline(0, color=style.faint, linewidth=0.8 * style.stroke, linestyle="--")
        size, width = 3.5 * style.stroke, 0.6 * style.stroke
        axes.errorbar(x, y, errors, fmt="o", color=style.colours[0], markersize=size, elinewidth=width)
        axes.set_xlabel(LABELS[measure])
        axes.set_ylabel("bits per byte\nwithout the head")
        rho = rank_correlation(torch.tensor(x), torch.tensor(y))
        axes.set_title("" if math.isnan(rho) else f"Spearman's ρ = {rho:+.2f}", fontsize=style.settings["font.size"])
    return figure
