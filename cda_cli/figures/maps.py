"""Figures of matrices: measures of all heads, and the weights of one head over labelled tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cda_cli.figures.csv_rows import grouped
from cda_cli.figures.labels import LABELS
from cda_cli.figures.material import Material
from cda_cli.inspection import GRADIENTS, OF_BUDGET
from cda_cli.inspection.seen_rows import CAPPED_WEIGHT
from cda_cli.plots import COLUMN, Style, draw_map, draw_scale, drawable, new_figure
from cda_cli.token_labels import visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = (
    *("effective_support", "keys_95", "median_distance", "sink_mass", "gate_equivalent", "capped_share"),
    *GRADIENTS,  # where they were measured
)
COLUMNS = 3
LONGEST = 64  # tokens that can be labelled
IN_A_COLUMN = 24  # tokens at most
NULL = "∅"
WEIGHTS = (0.0, 1.0)
POINTS = 72  # of a font, in an inch


class OfHead(NamedTuple):
    """A measure of a head."""

    measure: str
    layer: int
    head: int
    value: float


def head_rows(material: Material) -> list[OfHead]:
    heads = material.examined.report.heads
    known = [name for name in MEASURES if name in heads[0].measures]
    measures = [name for name in known if material.examined.has_budget or name not in OF_BUDGET]
    rows = [OfHead(name, head.layer, head.head, head.measures[name]) for name in measures for head in heads]
    empty = {name for name, of in grouped(rows, lambda row: row.measure).items() if all(map(math.isnan, _values(of)))}
    return [row for row in rows if row.measure not in empty]


def _values(rows: Sequence[OfHead]) -> list[float]:
    return [row.value for row in rows]


def draw_heads(style: Style, rows: Sequence[OfHead]) -> Figure:
    measures = grouped(rows, lambda row: row.measure)
    lines = math.ceil(len(measures) / COLUMNS)
    figure, all_axes = new_figure(style, 1, 0.28 * lines, lines, COLUMNS)
    for axes, (measure, of) in zip(all_axes, measures.items(), strict=False):
        layers = grouped(of, lambda row: row.layer)
        drawn = draw_map(axes, style, 1 / COLUMNS, [_values(each) for each in layers.values()])
        name_cells(axes.set_xticks, [row.head for row in next(iter(layers.values()))])
        name_cells(axes.set_yticks, list(layers))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        draw_scale(figure, axes, drawn)
        axes.set_title(LABELS[measure], fontsize=style.settings["font.size"])
    for axes in all_axes[len(measures) :]:
        axes.remove()
    return figure


def name_cells(set_ticks: Callable[..., object], numbers: Sequence[int]) -> None:
    """Names the middle of each cell, or of some of them where they are many."""
    every = math.ceil(len(numbers) / 8)
    set_ticks([place + 0.5 for place in range(0, len(numbers), every)], list(map(str, numbers[::every])))


class Weight(NamedTuple):
    """The weight λ of a key in the row of a query; null keys have numbers below 0. `capped` is 1 where λ is capped."""

    query: int
    query_token: str
    key: int
    key_token: str
    weight: float
    capped: int


def weight_rows(material: Material) -> list[Weight]:
    tokens, weights = material.head_map.tokens[:LONGEST], material.head_map.weights
    null = len(weights[0]) - len(weights)
    names = [NULL] * null + list(tokens)
    return [
        Weight(query, token, key - null, names[key], weight, int(weight >= CAPPED_WEIGHT))
        for query, token in enumerate(tokens)
        for key, weight in enumerate(weights[query][: query + 1 + null])
    ]


def draw_weights(style: Style, rows: Sequence[Weight]) -> Figure:
    """Capped keys have a mark besides their colour."""
    queries = {row.query: row.query_token for row in rows}
    keys = {row.key: row.key_token for row in sorted(rows, key=lambda row: row.key)}
    null = -min(keys)
    values = [[math.nan] * len(keys) for _ in queries]
    for row in rows:
        values[row.query][row.key + null] = row.weight
    side = 1 if len(queries) > IN_A_COLUMN else COLUMN
    figure, (axes,) = new_figure(style, side, 0.9 * side)
    drawn = draw_map(axes, style, side, values, WEIGHTS)
    axes.set_aspect("equal")
    cell = 0.75 * style.page * side * POINTS / len(keys)  # points
    marked = [(row.key + null + 0.5, row.query + 0.5) for row in rows if row.capped]
    if marked:
        x, y = zip(*marked, strict=True)
        # White and black are seen on every colour of a map, and on every paper.
        size, edge = (0.4 * cell) ** 2, 0.06 * cell
        axes.scatter(x, y, size, facecolors="white", edgecolors="black", linewidths=edge, label="capped: λ = 1")
        figure.legend(loc="outside upper right")
    font = {"fontsize": min(0.85 * cell, style.settings["font.size"]), "parse_math": False}
    for set_ticks, names in ((axes.set_xticks, keys), (axes.set_yticks, queries)):
        labels = [token if token == NULL else visible(token) for token in names.values()]
        set_ticks([place + 0.5 for place in range(len(names))], list(map(drawable, labels)), **font)
    axes.tick_params(length=0)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    draw_scale(figure, axes, drawn, "weight λ", shrink=0.6)
    return figure
