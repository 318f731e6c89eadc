"""What an inspection finds: figures of each head, feed-forward layer and block, as Python and as JSON."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from cda_cli.inspection.residual import ResidualFigures
from cda_cli.inspection.statistics import Histogram, range_ends
from cda_cli.inspection.units import UnitFigures
from cda_cli.plurals import counted

SHORT_NAMES = {"support": "effective_support", "k": "sparsity_k"}
TYPICAL_SHARE, TYPICAL_LIFT = 0.2, 2.0  # A head reads a pattern that has so much of its mass, and so much lift.
HEAD_TYPES = ("induction", "duplicate", "previous", "self", "first")


@dataclass(frozen=True)
class HeadReport:
    """One head. `measures` has one figure by each name in docs/inspection.md, NaN where it has no meaning.

    `quantiles` has p5, p50 and p95 over rows by measure. `by_position` has the means over the queries in each range of
    positions by measure. `distance_mass` is the share of the mass in each range of distances. The ranges are 0, 1, 2–3,
    4–7, 8–15 and so on (`statistics.range_ends`). `histograms` are those of the quantiles.
    """

    layer: int
    head: int
    measures: Mapping[str, float]
    quantiles: Mapping[str, Mapping[str, float]]
    by_position: Mapping[str, list[float]]
    distance_mass: list[float]
    histograms: Mapping[str, Histogram] = field(default_factory=dict, repr=False, compare=False)

    @property
    def name(self) -> str:
        return f"head[{self.layer}.{self.head}]"

    @property
    def reads(self) -> str | None:
        """The pattern of keys that the head reads most beyond chance, if any (docs/inspection.md)."""
        lifts = {
            name: self.measures[f"{name}_lift"]
            for name in HEAD_TYPES
            if self.measures[f"{name}_share"] >= TYPICAL_SHARE and self.measures[f"{name}_lift"] >= TYPICAL_LIFT
        }
        return max(lifts, key=lambda name: lifts[name]) if lifts else None

    def as_dict(self) -> dict[str, Any]:
        rest = {"quantiles": self.quantiles, "by_position": self.by_position, "distance_mass": self.distance_mass}
        return {"name": self.name, "layer": self.layer, "head": self.head, **self.measures, **rest}


class LayerReport(NamedTuple):
    """One layer: its feed-forward, the residual stream after it, and the Jensen–Shannon divergence of its heads.

    `unit_frequency` has for each unit of the feed-forward the share of the tokens on which it is in use.
    """

    layer: int
    units: UnitFigures
    residual: ResidualFigures
    head_divergence: float
    unit_frequency: Sequence[float]


@dataclass(frozen=True)
class Report:
    heads: list[HeadReport]
    layers: list[LayerReport]
    tokens: int
    windows: int

    @property
    def extent(self) -> str:
        """How much text was inspected, in words."""
        return f"{self.tokens:,} tokens in {counted(self.windows, 'window')}"

    def only(self, layers: Collection[int], heads: Collection[int]) -> Report:
        """Keeps these layers and heads alone."""
        return replace(
            self,
            heads=[head for head in self.heads if head.layer in layers and head.head in heads],
            layers=[layer for layer in self.layers if layer.layer in layers],
        )

    def adding(self, measures: Mapping[str, Tensor]) -> Report:
        """Adds further measures of each head, [L, H]. Call it before `only`."""
        added = [{name: of[head.layer, head.head].item() for name, of in measures.items()} for head in self.heads]
        heads = [replace(head, measures={**head.measures, **of}) for head, of in zip(self.heads, added, strict=True)]
        return replace(self, heads=heads)

    def all_heads(self) -> dict[str, dict[str, float]]:
        """The mean, the smallest and the largest of each measure over the heads, NaN aside; quantiles over all rows."""
        figures: dict[str, dict[str, float]] = {}
        for name in self.heads[0].measures:
            values = [head.measures[name] for head in self.heads if not math.isnan(head.measures[name])]
            known = (sum(values) / len(values), min(values), max(values)) if values else (math.nan,) * 3
            figures[name] = dict(zip(("mean", "min", "max"), known, strict=True))
        for name in self.heads[0].histograms:
            figures[name] |= Histogram.joined([head.histograms[name] for head in self.heads]).quantiles()[0]
        return figures

    def as_dict(self) -> dict[str, Any]:
        ranges = max(len(each) for head in self.heads for each in (*head.by_position.values(), head.distance_mass))
        return {
            "tokens": self.tokens,
            "windows": self.windows,
            "ranges": [list(range_ends(index)) for index in range(ranges)],
            "all_heads": self.all_heads(),
            "heads": [head.as_dict() for head in self.heads],
            "layers": [
                {"layer": each.layer, "head_divergence": each.head_divergence, **each.residual._asdict()}
                for each in self.layers
            ],
            "feed_forward": [{"layer": each.layer, **each.units._asdict()} for each in self.layers],
        }


def named_metrics(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document of a report, for conditions: what `all_heads` has is also found without that word.

    Of the measures, `support` stands for `effective_support`, and `k` for `sparsity_k`.
    """
    overall = document["all_heads"]
    return {**document, **overall, **{short: overall[name] for short, name in SHORT_NAMES.items()}}
