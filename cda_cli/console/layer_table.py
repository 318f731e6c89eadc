"""What the layers select: a table with a row for each layer, or with those in the middle as one row of ranges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.table import Table

from cda_cli.console.base import table
from cda_cli.runs.records import LayerRecord


class Measure(NamedTuple):
    """A column of the table. `word` stands for it in a plain line, if it is there; `coarse` formats a range's ends."""

    header: str
    word: str
    value: Callable[[LayerRecord], float]
    fine: str
    coarse: str
    of_budget: bool = False  # means nothing where the rows of attention have no budget
    of_router: bool = False  # means nothing where no router chooses blocks of units

    def range(self, layers: Sequence[LayerRecord], dash: str) -> str:
        """The lowest and the highest value, such as 4.9–9.5, or the one value where both read the same."""
        values = [self.value(layer) for layer in layers]
        ends = [format(end, self.coarse) for end in (min(values), max(values))]
        return dash.join(dict.fromkeys(ends))


MEASURES = (
    Measure("mean k", "k", lambda layer: layer.sparsity_k, ".3f", ".2f", of_budget=True),
    Measure("effective support", "support", lambda layer: layer.effective_support, ".2f", ".1f"),
    Measure("capped/k", "capped", lambda layer: layer.capped_share, ".1%", ".0%", of_budget=True),
    Measure("distance back", "", lambda layer: layer.distance_back, ".1f", ".1f"),
    Measure("active units", "", lambda layer: layer.active_units, ".1%", ".0%"),
    Measure("blocks", "", lambda layer: layer.active_blocks or 0.0, ".2f", ".1f", of_router=True),
)


def measures(layers: Sequence[LayerRecord], has_budget: bool) -> list[Measure]:
    """The measures that mean something for these layers."""
    has_router = any(layer.active_blocks is not None for layer in layers)
    return [
        measure
        for measure in MEASURES
        if (has_budget or not measure.of_budget) and (has_router or not measure.of_router)
    ]


def range_words(layers: Sequence[LayerRecord], has_budget: bool, dash: str) -> list[str]:
    """Returns the parts of a plain line: each measure that has a word, over all layers."""
    shown = [measure for measure in measures(layers, has_budget) if measure.word and layers]
    return [f"{measure.word} {measure.range(layers, dash)}" for measure in shown]


def layer_table(
    layers: Sequence[LayerRecord], columns: Sequence[Measure], rows: int | None = None, dash: str = "–"
) -> Table:
    """A row for each layer. Where that is more than `rows`, at least 1, ranges stand for the layers in the middle."""
    made = table("layer", *(measure.header for measure in columns))
    for column in made.columns:
        column.no_wrap = rows is not None  # then each row is one line
    collapsed = rows is not None and len(layers) > rows
    first, last = ((rows or 0) // 2, ((rows or 0) - 1) // 2) if collapsed else (len(layers), 0)
    middle = layers[first : len(layers) - last]
    for layer in layers[:first]:
        made.add_row(str(layer.layer), *(format(measure.value(layer), measure.fine) for measure in columns))
    if middle:
        name = f"+{len(middle)} more" if first else f"all {len(middle)}"
        made.add_row(name, *(measure.range(middle, dash) for measure in columns), style="dim")
    for layer in layers[len(layers) - last :]:
        made.add_row(str(layer.layer), *(format(measure.value(layer), measure.fine) for measure in columns))
    return made
