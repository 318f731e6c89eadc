"""What `cda_cli.inspect` returns: what each layer and head of a model selects on a text, as tables, rows and checks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cda_cli.conditions import parse_condition, require
from cda_cli.data import Encoded, Tokens, evaluation_batches
from cda_cli.errors import ConfigError
from cda_cli.inspection import (
    NAMES,
    QUANTILES,
    Report,
    ReportWatcher,
    RowCollector,
    RowStore,
    StoredRow,
    inspect,
    named_figures,
    parse_size,
)
from cda_cli.inspection.notebook import report_html
from cda_cli.inspection.tables import Columns, Table
from cda_cli.language_model import LanguageModel, load_language_model
from cda_cli.plurals import counted

MARKS = ("p5", "p50", "p95")


class SparsityReport:
    """What a model selects on a text. docs/inspection.md explains each measure.

    `figures` has the measures over the whole text. `store` has the largest weights of each row of the first window,
    whose tokens are `tokens`, as text. `source` says what was inspected.
    """

    def __init__(self, figures: Report, store: RowStore, tokens: Sequence[str], source: Mapping[str, Any]) -> None:
        self.figures, self.store, self.tokens, self.source = figures, store, tokens, source

    def __repr__(self) -> str:
        figures = self.figures
        size = f"{figures.tokens:,} tokens in {counted(figures.windows, 'window')}"
        return f"<SparsityReport of {self.source['model']}: {len(figures.heads)} heads, {size}>"

    def _repr_html_(self) -> str:
        """For a notebook: a static table and a map of the heads, without a script, of less than 200 kB."""
        return report_html(self.figures, str(self.source["model"]))

    def as_dict(self) -> dict[str, Any]:
        """The document of `cda inspect-sparsity --json`; a figure that has no meaning is NaN."""
        return {**self.source, **self.figures.as_dict()}

    @property
    def heads(self) -> Table:
        """A row for each head: `layer`, `head`, each measure, and quantiles over its rows, as `keys_95_p95`."""
        return Table(lambda: iter([self._heads()]))

    @property
    def layers(self) -> Table:
        """A row for each layer: how far its heads differ, and the residual stream after it."""
        rows = [
            {"layer": each.layer, "head_divergence": each.head_divergence, **each.residual._asdict()}
            for each in self.figures.layers
        ]
        for row in rows:
            row["massive_channels"] = len(row["massive_channels"])
        return Table(lambda: iter([_columns(rows)]))

    @property
    def units(self) -> Table:
        """A row for each feed-forward layer."""
        return Table(
            lambda: iter([_columns([{"layer": each.layer, **each.units._asdict()} for each in self.figures.layers])])
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

    def check(self, condition: str) -> None:
        """Raises CheckFailedError, with the figure, unless the condition holds, such as "support.p95 < 64".

        The figures have the names that `cda inspect-sparsity --fail-if` knows. Raises ConfigError for another one.
        """
        require(parse_condition(condition), named_figures(self.as_dict()))

    def diff(self, other: SparsityReport) -> Table:
        """Returns a table with a row for each head: each measure of `other` minus that of this report.

        Raises ConfigError unless both are of one text, with the same heads.
        """
        places, others = ([(head.layer, head.head) for head in each.figures.heads] for each in (self, other))
        if places != others:
            raise ConfigError("the models have other layers and heads, so no head has its counterpart")
        if self.source["text"] != other.source["text"]:
            raise ConfigError("the reports are of two texts; inspect both models on the same one")

        def differences() -> Columns:
            left, right = self._heads(), other._heads()
            return {name: left[name] if name in ("layer", "head") else right[name] - left[name] for name in left}

        return Table(lambda: iter([differences()]))

    def _heads(self) -> Columns:
        return _columns(
            [
                {"layer": head.layer, "head": head.head}
                | {name: head.measures[name] for name in NAMES}
                | {f"{name}_{mark}": head.quantiles[name][mark] for name in QUANTILES for mark in MARKS}
                for head in self.figures.heads
            ]
        )

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


def inspect_model(
    model: str | Path | LanguageModel,
    text: str,
    *,
    keep: float,
    budget: str | int,
    device: str,
    dtype: str,
    backend: str,
) -> SparsityReport:
    """Does what `cda_cli.inspect` says."""
    if not isinstance(model, LanguageModel):
        model = load_language_model(model, best=False, ema=False, device=device, dtype=dtype, backend=backend)
    return _inspect_ours(model, text, keep, parse_size(budget))


def _inspect_ours(lm: LanguageModel, text: str, keep: float, budget: int) -> SparsityReport:
    # No window has the last token of a text as an input, so the separator stands there.
    encoded = Encoded.join([lm.encoded(text), lm.tokenizer.ending])
    if len(encoded.ids) < 2:
        raise ConfigError("the text is empty; give one token at least")
    config = lm.config.model
    collector = RowCollector(config.depth, budget, keep)
    watcher = ReportWatcher(config.attn_k, collector=collector)
    batches = list(evaluation_batches(Tokens(*encoded, text_bytes=0), config.seq_len, 1))
    inspect(lm.model, batches, lm.device, lm.dtype, watcher)
    tokens = [lm.tokenizer.decode([int(token)]) for token in batches[0].inputs[0]]
    source = {"model": str(lm.path), "text": _digest(text), "attn_eps": lm.model.attention_eps}
    return SparsityReport(watcher.report(), collector.store(), tokens, source)


def _digest(text: str) -> str:
    """What tells one text from another, in few characters."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
