"""A report as static HTML for a notebook: a map of the heads and a table, without a script, a style or a request.

What shows a notebook often takes scripts and styles out of it. So colours are attributes of the elements.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from cda_cli.inspection.measures import OF_BUDGET
from cda_cli.inspection.report import HeadReport, Report
from cda_cli.plurals import counted
from cda_cli.scales import CIVIDIS

CELL = 14  # pixels
MOST_HEADS = 64  # A table with more rows than this has a row for each layer.
MEASURE = "effective_support"  # of the map
COLUMNS = {
    "sparsity_k": "k",
    "effective_support": "support",
    "keys_95": "keys for 95 %",
    "capped_share": "capped/k",
    "gate_equivalent": "gated",
    "sink_mass": "sink",
    "median_distance": "distance",
}
SHARES = ("capped_share", "gate_equivalent", "sink_mass")


def report_html(report: Report, name: str, verdict: Sequence[str], has_budget: bool) -> str:
    """Returns the report of the model called `name`, with the sentences of its verdict, as an element of HTML.

    It has less than 200 kB. `has_budget` says whether rows have a budget k.
    """
    size = f"{counted(len(report.heads), 'head')}, {report.tokens:,} tokens in {counted(report.windows, 'window')}"
    summary = f"<p><b>{html.escape(name)}</b>: {size}</p><p>{html.escape(' '.join(verdict))}</p>"
    return f"<div>{summary}{_map(report.heads)}{_table(report, has_budget)}</div>"


def _map(heads: Sequence[HeadReport]) -> str:
    """The map of all heads, layers down: one path for each colour, so that thousands of heads take few bytes.

    A head is a stroke that is as thick as it is long.
    """
    values = [head.measures[MEASURE] for head in heads]
    lowest, highest = min(values), max(values)
    layers, places = ({number: at for at, number in enumerate(sorted(numbers))} for numbers in _numbers(heads))
    paths = [""] * len(CIVIDIS)
    for head, value in zip(heads, values, strict=True):
        step = math.log(value / lowest) / math.log(highest / lowest) if highest > lowest > 0 else 0.0
        paths[min(len(CIVIDIS) - 1, int(step * len(CIVIDIS)))] += f"M{places[head.head]} {layers[head.layer]}h.9"
    drawn = "".join(
        f'<path stroke="{colour}" d="{path}"/>' for colour, path in zip(CIVIDIS, paths, strict=True) if path
    )
    legend = f"effective support, from {lowest:.1f} (dark) to {highest:.1f} keys (bright); layers down, heads across"
    across, down = len(places), len(layers)
    size = f'width="{CELL * across}" height="{CELL * down}" viewBox="0 0 {across} {down}"'
    strokes = f'<g transform="translate(0 .5)" stroke-width=".9">{drawn}</g>'
    picture = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{legend}">{strokes}</svg>'
    return f"{picture}<p>{legend}</p>"


def _numbers(heads: Sequence[HeadReport]) -> tuple[set[int], set[int]]:
    return {head.layer for head in heads}, {head.head for head in heads}


def _table(report: Report, has_budget: bool) -> str:
    """A row for each head, or the means of each layer where there are many."""
    if len(report.heads) <= MOST_HEADS:
        first, rows = "head", [(f"{head.layer}.{head.head}", [head]) for head in report.heads]
    else:
        layers = sorted({head.layer for head in report.heads})
        first = "layer"
        rows = [(str(layer), [head for head in report.heads if head.layer == layer]) for layer in layers]
    columns = {measure: name for measure, name in COLUMNS.items() if has_budget or measure not in OF_BUDGET}
    heading = "".join(f'<th scope="col">{name}</th>' for name in (first, *columns.values()))
    lines = [
        f'<tr><th scope="row">{name}</th>{"".join(f"<td>{_mean(heads, measure)}</td>" for measure in columns)}</tr>'
        for name, heads in rows
    ]
    return f"<table><thead><tr>{heading}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _mean(heads: Sequence[HeadReport], measure: str) -> str:
    values = [head.measures[measure] for head in heads if not math.isnan(head.measures[measure])]
    if not values:
        return "–"
    mean = sum(values) / len(values)
    return f"{mean:.1%}" if measure in SHARES else f"{mean:.2f}"
