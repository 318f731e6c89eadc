"""What `cda_cli.inspect` returns: what each layer and head of a model selects on a text, as tables, rows and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cda_cli.causal import Effects, Examined
from cda_cli.conditions import parse_condition, require
from cda_cli.errors import ConfigError
from cda_cli.inspection import QUANTILES, LiveCollector, Report, RowStore, StoredRow, named_metrics
from cda_cli.inspection.notebook import report_html
from cda_cli.inspection.tables import Columns, Table
from cda_cli.inspection.watchers import MOST_DRAWN
from cda_cli.ops import soft_topk
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = ("p5", "p50", "p95")


class SparsityReport:
    """What a model selects on a text. docs/inspection.md explains each measure.

    `examined` is what was measured over the whole text. `store` has the largest weights of each row of the first
    window, whose tokens are `tokens`, as text. `source` says what was inspected. `live` has queries and keys of that
    window, if their soft top-k are the weights.
    """

    def __init__(
        self,
        examined: Examined,
        store: RowStore,
        tokens: Sequence[str],
        source: Mapping[str, Any],
        live: LiveCollector | None = None,
    ) -> None:
        self.examined, self.store, self.tokens, self.source, self.live = examined, store, tokens, source, live

    @property
    def measures(self) -> Report:
        """The measures over the whole text."""
        return self.examined.report

    @property
    def effects(self) -> Effects | None:
        """The effects of causal checks, if these were asked for."""
        return self.examined.effects

    def __repr__(self) -> str:
        heads = counted(len(self.measures.heads), "head")
        return f"<SparsityReport of {self.source['model']}: {heads}, {self.measures.extent}>"

    def _repr_html_(self) -> str:
        """For a notebook: a static table and a map of the heads, without a script, of less than 200 kB."""
        return report_html(self.measures, str(self.source["model"]), self.verdict, self.examined.has_budget)

    def as_dict(self) -> dict[str, Any]:
        """The document of `cda inspect-sparsity --json`; a figure that has no meaning is NaN."""
        return self.examined.document(self.source)

    @property
    def verdict(self) -> list[str]:
        """Sentences with figures: how many keys hold a row, what the budget does, and where the rest goes."""
        return self.examined.verdict

    @property
    def heads(self) -> Table:
        """A row for each head: `layer`, `head`, each measure, and quantiles over its rows, as `keys_95_p95`."""
        return Table(lambda: iter([self._heads()]))

    @property
    def layers(self) -> Table:
        """A row for each layer: how far its heads differ, and the residual stream after it."""
        rows = [
            {"layer": each.layer, "head_divergence": each.head_divergence, **each.residual._asdict()}
            for each in self.measures.layers
        ]
        for row in rows:
            row["massive_channels"] = len(row["massive_channels"])
        return Table(lambda: iter([_columns(rows)]))

    @property
    def units(self) -> Table:
        """A row for each feed-forward layer."""
        return Table(
            lambda: iter([_columns([{"layer": each.layer, **each.units._asdict()} for each in self.measures.layers])])
        )

    @property
    def rows(self) -> Table:
        """A row for each stored row of weights: of which query, its k, its kept and its capped keys, and the rest.

        `rest` is the sum of the weights of all other keys.
        """
        return Table(lambda: map(self._rows, self.store.heads))

    @property
    def weights(self) -> Table:
        """A row for each kept weight: `layer`, `head`, `query`, `key`, `weight` and whether it is `capped`.

        A key is its place in the window, and null keys are −1, −2 …
        """
        return Table(lambda: map(self._weights, self.store.heads))

    def row(self, layer: int, head: int, query: int) -> StoredRow:
        """Returns the kept keys of a row in order, their weights, whether each is capped, k, and the rest."""
        return self.store.row(layer, head, query)

    def row_with(
        self, layer: int, head: int, query: int, *, k: float | None = None, eps: float | None = None
    ) -> NDArray[np.float32]:
        """Computes a row with another k or ε than the model's: λ of all keys that the query sees, null keys first.

        This is what the model would select if it were not trained for it. The weights are approximate, as queries and
        keys have 8 bits. Raises ConfigError for a row that the store does not have, for a k or an ε that is not above
        0, and where the weights are no soft top-k of the scores of a run.
        """
        row, own_eps = self.row(layer, head, query), self.examined.eps
        if self.live is None or own_eps is None:
            raise ConfigError(
                "only rows of a run with coordinate-descent attention and the exact solver can be computed with "
                "another k or ε"
            )
        scores = self.live.head(layer, head, self.store.queries, self.store.null_keys).scores(query)
        k, eps = row.sparsity_k if k is None else k, own_eps if eps is None else eps
        try:
            return soft_topk(torch.from_numpy(scores), k, eps=eps).float().numpy()
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def plot(self, figure: str, *, layer: int = 0, head: int = 0, style: str = "paper") -> Figure:
        """Draws a figure of `cda inspect-sparsity --figures`: "heads", "positions", "distances", "units" or "head-map".

        The last one is of the `head` in `layer`, over the beginning of the text. Styles are "paper", "slides", "dark"
        and "mono". Returns a figure of matplotlib, which is the extra `plot`. Raises ConfigError for another name, for
        a figure of what was not measured, and without matplotlib.
        """
        from cda_cli.figures import HeadMap, Material, draw

        weights = self._first_weights(layer, head)
        head_map = HeadMap(layer, head, self.tokens[: len(weights)], weights)
        source = f"{self.source['model']}: {self.measures.extent}."
        return draw(figure, Material(source, self.examined, head_map, []), style)

    def save(self, path: str | Path) -> None:
        """Writes the report as one page of HTML, as `cda inspect-sparsity --html` does: it works offline.

        It takes about 4/3 of the bytes of the store, a few hundred kB besides, and live heads. Raises StorageError if
        the page cannot be written.
        """
        from cda_cli.page import live_heads, page_content, write_page

        name = str(self.source["model"])
        source = {"model": name, "inspected": self.measures.extent}
        live = live_heads(self.measures, self.store, self.live) if self.live else []
        write_page(Path(path), page_content(name, source, self.examined, self.store, self.tokens, live))

    def check(self, condition: str) -> None:
        """Raises CheckFailedError, with the figure, unless the condition holds, such as "support.p95 < 64".

        The figures have the names that `cda inspect-sparsity --fail-if` knows. Raises ConfigError for another one.
        """
        require(parse_condition(condition), named_metrics(self.as_dict()))

    def diff(self, other: SparsityReport) -> Table:
        """Returns a table with a row for each head: each measure of `other` minus that of this report.

        Raises ConfigError unless both are of one text, with the same heads.
        """
        places, others = ([(head.layer, head.head) for head in each.measures.heads] for each in (self, other))
        if places != others:
            raise ConfigError("the models have other layers and heads, so no head has its counterpart")
        if self.source["text"] != other.source["text"]:
            raise ConfigError("the reports are of two texts; inspect both models on the same one")

        def differences() -> Columns:
            left, right = self._heads(), other._heads()
            both = [name for name in left if name in right]
            return {name: left[name] if name in ("layer", "head") else right[name] - left[name] for name in both}

        return Table(lambda: iter([differences()]))

    def _heads(self) -> Columns:
        return _columns(
            [
                {"layer": head.layer, "head": head.head}
                | dict(head.measures)
                | {f"{name}_{mark}": head.quantiles[name][mark] for name in QUANTILES for mark in MARKS}
                for head in self.measures.heads
            ]
        )

    def _first_weights(self, layer: int, head: int) -> list[list[float]]:
        """The kept weights [T][S] of a head over the first MOST_DRAWN tokens, null keys first, or 0."""
        rows, null, T = self.store.rows(layer, head), self.store.null_keys, min(self.store.queries, MOST_DRAWN)
        weights = np.zeros((T, null + T))
        query = np.repeat(np.arange(T), rows.length[:T])
        weights[query, null + query - rows.distance[: len(query)]] = rows.weight[: len(query)]
        return weights.tolist()

    def _rows(self, place: tuple[int, int]) -> Columns:
        rows, query = self.store.rows(*place), np.arange(self.store.queries)
        of_keys = np.repeat(query, rows.length)
        return {
            **_place(place, self.store.queries),
            "query": query.astype(np.int32),
            "sparsity_k": rows.k,
            "kept_keys": rows.length.astype(np.int32),
            "capped_keys": np.bincount(of_keys, rows.capped, self.store.queries).astype(np.int32),
            "rest": rows.rest,
        }

    def _weights(self, place: tuple[int, int]) -> Columns:
        rows = self.store.rows(*place)
        query = np.repeat(np.arange(self.store.queries), rows.length)
        return {
            **_place(place, len(query)),
            "query": query.astype(np.int32),
            "key": (query - rows.distance).astype(np.int32),
            "weight": rows.weight.astype(np.float32),
            "capped": rows.capped,
        }


def _place(place: tuple[int, int], rows: int) -> dict[str, Any]:
    return {name: np.full(rows, number, np.int32) for name, number in zip(("layer", "head"), place, strict=True)}


def _columns(rows: list[dict[str, Any]]) -> Columns:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
