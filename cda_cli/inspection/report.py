"""What an inspection finds: figures of each head, feed-forward layer and block, as Python and as JSON."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cda_cli.inspection.residual import ResidualFigures
from cda_cli.inspection.statistics import range_ends
from cda_cli.inspection.units import UnitFigures


@dataclass(frozen=True)
class HeadReport:
    """One head. `measures` has one figure by each name in docs/inspection.md, NaN where it has no meaning.

    `quantiles` has p5, p50 and p95 over rows by measure. `by_position` has the means over the queries in each range of
    positions by measure. `distance_mass` is the share of the mass in each range of distances. The ranges are 0, 1, 2–3,
    4–7, 8–15 and so on (`statistics.range_ends`).
    """

    layer: int
    head: int
    measures: Mapping[str, float]
    quantiles: Mapping[str, Mapping[str, float]]
    by_position: Mapping[str, list[float]]
    distance_mass: list[float]

    def as_dict(self) -> dict[str, Any]:
        rest = {"quantiles": self.quantiles, "by_position": self.by_position, "distance_mass": self.distance_mass}
        return {"layer": self.layer, "head": self.head, **self.measures, **rest}


class LayerReport(NamedTuple):
    """One layer: its feed-forward, the residual stream after it, and the Jensen–Shannon divergence of its heads."""

    layer: int
    units: UnitFigures
    residual: ResidualFigures
    head_divergence: float


@dataclass(frozen=True)
class Report:
    heads: list[HeadReport]
    layers: list[LayerReport]
    tokens: int
    windows: int

    def only(self, layers: Collection[int], heads: Collection[int]) -> Report:
        """Keeps these layers and heads alone."""
        return replace(
            self,
            heads=[head for head in self.heads if head.layer in layers and head.head in heads],
            layers=[layer for layer in self.layers if layer.layer in layers],
        )

    def as_dict(self) -> dict[str, Any]:
        ranges = max(len(each) for head in self.heads for each in (*head.by_position.values(), head.distance_mass))
        return {
            "tokens": self.tokens,
            "windows": self.windows,
            "ranges": [list(range_ends(index)) for index in range(ranges)],
            "heads": [head.as_dict() for head in self.heads],
            "layers": [
                {"layer": each.layer, "head_divergence": each.head_divergence, **each.residual._asdict()}
                for each in self.layers
            ],
            "feed_forward": [{"layer": each.layer, **each.units._asdict()} for each in self.layers],
        }
