"""Figures of lines: the loss against the keys kept, positions, distances, training, and feed-forward units."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from cda_cli.causal import curve_points
from cda_cli.figures.csv_rows import grouped
from cda_cli.figures.labels import LABELS
from cda_cli.figures.material import Material
from cda_cli.inspection.statistics import range_ends
from cda_cli.plots import (
    COLUMN,
    Point,
    Style,
    draw_curves,
    draw_layers,
    draw_line,
    name_layers,
    new_figure,
    plain_log_axis,
)
from cda_cli.scales import LINEAR_BELOW

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Kept(NamedTuple):
    """What a cut to so many keys for each query adds to the bits per byte, with its interval."""

    choice: str
    keys: int
    difference: float
    low: float
    high: float


def kept_rows(material: Material) -> list[Kept]:
    if material.examined.effects is None:
        return []
    curves = curve_points(material.examined.effects)
    return [Kept(choice, int(x), y, low, high) for choice, points in curves.items() for x, y, low, high in points]


def draw_kept(style: Style, rows: Sequence[Kept]) -> Figure:
    figure, (axes,) = new_figure(style, COLUMN, 0.42)
    lines = {choice: [Point(*row[1:]) for row in of] for choice, of in grouped(rows, lambda row: row.choice).items()}
    y_label = "bits per byte more\nthan with all keys"
    draw_curves(figure, axes, style, lines, "keys kept for each query", y_label, "all keys", LINEAR_BELOW)
    return figure


class AtPosition(NamedTuple):
    """Quantiles over the heads of the mean of a measure over the queries at the positions `first` to `last`."""

    measure: str
    first: int
    last: int
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float


def position_rows(material: Material) -> list[AtPosition]:
    rows = []
    for measure in [*(["sparsity_k"] if material.examined.has_budget else []), "effective_support"]:
        of_heads = zip(*(head.by_position[measure] for head in material.examined.report.heads), strict=True)
        rows += [AtPosition(measure, *range_ends(index), *_quantiles(each)) for index, each in enumerate(of_heads)]
    return rows


def _quantiles(values: Sequence[float]) -> list[float]:
    """The 5, 25, 50, 75 and 95 % quantiles, between the two nearest values where it is none of them."""
    if len(values) == 1:
        return [*values] * 5
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return [cuts[index] for index in (0, 4, 9, 14, 18)]


def draw_positions(style: Style, rows: Sequence[AtPosition]) -> Figure:
    measures = grouped(rows, lambda row: row.measure)
    figure, all_axes = new_figure(style, 1 if len(measures) > 1 else COLUMN, 0.36, 1, len(measures))
    for axes, (measure, of) in zip(all_axes, measures.items(), strict=True):
        x = [(row.first + row.last) / 2 + 1 for row in of]
        for low, high, opacity in (("p5", "p95", 0.15), ("p25", "p75", 0.3)):
            below, above = ([getattr(row, end) for row in of] for end in (low, high))
            axes.fill_between(x, below, above, color=style.colours[0], alpha=opacity, linewidth=0)
        draw_line(axes, style, 0, "median of the heads", [Point(at, row.p50) for at, row in zip(x, of, strict=True)])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda number, _: f"{number:g}")
        axes.set_xlabel("keys that the query sees")
        axes.set_ylabel(LABELS[measure])
        axes.set_ylim(bottom=0)
    return figure


class AtDistance(NamedTuple):
    """The share of the mass of a layer's rows, the mean over its heads, that lies `first` to `last` tokens back."""

    layer: int
    first: int
    last: int
    share: float


def distance_rows(material: Material) -> list[AtDistance]:
    rows = []
    for layer, heads in grouped(material.examined.report.heads, lambda head: head.layer).items():
        for index, shares in enumerate(zip(*(head.distance_mass for head in heads), strict=True)):
            rows.append(AtDistance(layer, *range_ends(index), statistics.fmean(shares)))
    return rows


def draw_distances(style: Style, rows: Sequence[AtDistance]) -> Figure:
    figure, (axes,) = new_figure(style, COLUMN, 0.38)
    layers = grouped(rows, lambda row: row.layer)
    shares = {n: [Point(place, row.share or math.nan) for place, row in enumerate(of)] for n, of in layers.items()}
    draw_layers(axes, style, shares)
    ends = [(row.first, row.last) for row in next(iter(layers.values()))]
    names = [str(first) if first == last else f"{first}–{last}" for first, last in ends]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    plain_log_axis(axes)
    axes.set_xlabel("distance to the key (tokens)")
    axes.set_ylabel("share of the mass")
    name_layers(figure, [axes], style, list(layers))
    return figure


class AtStep(NamedTuple):
    """A figure of training at a step; `layer` is -1 for one of the whole model."""

    measure: str
    step: int
    layer: int
    value: float


WHOLE = -1


def training_rows(material: Material) -> list[AtStep]:
    if len(material.training) < 2:
        return []
    rows = [AtStep("loss", record.step, WHOLE, record.loss) for record in material.training]
    of_budget = ["sparsity_k", "capped_share"] if material.examined.has_budget else []
    for measure in ["effective_support", *of_budget]:
        for record in material.training:
            rows += [AtStep(measure, record.step, layer.layer, getattr(layer, measure)) for layer in record.layers]
    return rows


def draw_training(style: Style, rows: Sequence[AtStep]) -> Figure:
    measures = grouped(rows, lambda row: row.measure)
    figure, all_axes = new_figure(style, 1, 0.3 * math.ceil(len(measures) / 2), math.ceil(len(measures) / 2), 2)
    layers: list[int] = []
    for axes, (measure, of) in zip(all_axes, measures.items(), strict=True):
        lines = {
            layer: [Point(row.step, row.value) for row in each]
            for layer, each in grouped(of, lambda row: row.layer).items()
        }
        if WHOLE in lines:
            axes.plot(
                *zip(*(point[:2] for point in lines[WHOLE]), strict=True),
                color=style.faint,
                linewidth=1.1 * style.stroke,
            )
        else:
            layers = list(lines)
            draw_layers(axes, style, lines)
            axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        axes.set_ylabel(LABELS[measure])
    name_layers(figure, all_axes[1:], style, layers)
    return figure


class UnitQuantile(NamedTuple):
    """So large a share of a layer's units is in use on a share `frequency` of the tokens or more."""

    layer: int
    share_of_units: float
    frequency: float


STEPS = 200  # of the units of a layer, so that a wide layer makes no large file


def unit_rows(material: Material) -> list[UnitQuantile]:
    rows = []
    for layer in material.examined.report.layers:
        most_first = sorted(layer.unit_frequency, reverse=True)
        steps = min(STEPS, len(most_first) - 1)
        for step in range(steps + 1):
            place = round(step * (len(most_first) - 1) / steps) if steps else 0
            rows.append(UnitQuantile(layer.layer, (place + 1) / len(most_first), most_first[place]))
    return rows


def draw_units(style: Style, rows: Sequence[UnitQuantile]) -> Figure:
    figure, (axes,) = new_figure(style, COLUMN, 0.36)
    layers = grouped(rows, lambda row: row.layer)
    draw_layers(axes, style, {n: [Point(*row[1:]) for row in of] for n, of in layers.items()})
    axes.set_xlabel("share of the units, sorted")
    axes.set_ylabel("share of the tokens\non which a unit is in use")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    name_layers(figure, [axes], style, list(layers))
    return figure
