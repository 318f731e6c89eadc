"""What `cda_cli.inspect` returns: what each layer and head of a model selects on a text, as tables, rows and checks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cda_cli.causal import Effects, Examination, Wanted
from cda_cli.conditions import parse_condition, require
from cda_cli.data import Batch, Encoded, Tokens, evaluation_batches
from cda_cli.errors import ConfigError
from cda_cli.inspection import (
    QUANTILES,
    LiveCollector,
    LiveHead,
    Report,
    ReportWatcher,
    RowCollector,
    RowStore,
    StoredRow,
    named_figures,
    parse_size,
)
from cda_cli.inspection.live_heads import follows_from_scores
from cda_cli.inspection.notebook import report_html
from cda_cli.inspection.tables import Columns, Table
from cda_cli.language_model import LanguageModel, load_language_model
from cda_cli.ops import soft_topk
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cda_cli.page import PageContent

MARKS = ("p5", "p50", "p95")


class SparsityReport:
    """What a model selects on a text. docs/inspection.md explains each measure.

    `figures` has the measures over the whole text. `store` has the largest weights of each row of the first window,
    whose tokens are `tokens`, as text. `source` says what was inspected. `live` has queries and keys of that window, if
    their soft top-k are the weights. `has_budget` says whether rows have a budget k, and do not sum to 1. `effects` are
    those of causal checks.
    """

    def __init__(
        self,
        figures: Report,
        store: RowStore,
        tokens: Sequence[str],
        source: Mapping[str, Any],
        has_budget: bool,
        live: LiveCollector | None = None,
        effects: Effects | None = None,
    ) -> None:
        self.figures, self.store, self.tokens, self.source = figures, store, tokens, source
        self.has_budget, self.live, self.effects = has_budget, live, effects

    def __repr__(self) -> str:
        figures = self.figures
        size = f"{figures.tokens:,} tokens in {counted(figures.windows, 'window')}"
        return f"<SparsityReport of {self.source['model']}: {len(figures.heads)} heads, {size}>"

    def _repr_html_(self) -> str:
        """For a notebook: a static table and a map of the heads, without a script, of less than 200 kB."""
        return report_html(self.figures, str(self.source["model"]), self.verdict, self.has_budget)

    def as_dict(self) -> dict[str, Any]:
        """The document of `cda inspect-sparsity --json`; a figure that has no meaning is NaN."""
        further = {"causal": self.effects.document()} if self.effects else {}
        return {**self.source, **self.figures.as_dict(), **further}

    @property
    def verdict(self) -> list[str]:
        """Sentences with figures: how many keys hold a row, what the budget does, and where the rest goes."""
        from cda_cli.console import verdict

        return verdict(self.figures, self.has_budget, self.effects)

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

    def row_with(
        self, layer: int, head: int, query: int, *, k: float | None = None, eps: float | None = None
    ) -> NDArray[np.float32]:
        """Computes a row with another k or ε than the model's: λ of all keys that the query sees, null keys first.

        This is what the model would select if it were not trained for it. The weights are approximate, as queries and
        keys have 8 bits. Raises ConfigError for a row that the store does not have, for a k or an ε that is not above
        0, and where the weights are no soft top-k of the scores of a run.
        """
        row = self.row(layer, head, query)
        if self.live is None:
            raise ConfigError(
                "only rows of a run with coordinate-descent attention and the exact solver can be computed with "
                "another k or ε"
            )
        scores = self.live.head(layer, head, self.store.queries, self.store.null_keys).scores(query)
        k, eps = row.sparsity_k if k is None else k, self.source["attn_eps"] if eps is None else eps
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

        source = f"{self.source['model']}: {self.figures.tokens:,} tokens in {counted(self.figures.windows, 'window')}."
        head_map = HeadMap(layer, head, self.tokens[: self.store.queries], self._dense(layer, head))
        return draw(figure, Material(source, self.figures, self.has_budget, head_map, self.effects, []), style)

    def save(self, path: str | Path) -> None:
        """Writes the report as one page of HTML, as `cda inspect-sparsity --html` does: it works offline.

        It takes about 4/3 of the bytes of the store, a few hundred kB besides, and live heads. Raises StorageError if
        the page cannot be written.
        """
        from cda_cli.page import live_heads, write_page

        name, figures = str(self.source["model"]), self.figures
        content = page_content(
            name,
            {"model": name, "tokens": f"{figures.tokens:,} in {counted(figures.windows, 'window')}"},
            report=figures,
            store=self.store,
            tokens=self.tokens,
            has_budget=self.has_budget,
            effects=self.effects,
            live=live_heads(figures, self.store, self.live) if self.live else [],
            eps=self.source["attn_eps"],
        )
        write_page(Path(path), content)

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
            both = [name for name in left if name in right]
            return {name: left[name] if name in ("layer", "head") else right[name] - left[name] for name in both}

        return Table(lambda: iter([differences()]))

    def _heads(self) -> Columns:
        return _columns(
            [
                {"layer": head.layer, "head": head.head}
                | dict(head.measures)
                | {f"{name}_{mark}": head.quantiles[name][mark] for name in QUANTILES for mark in MARKS}
                for head in self.figures.heads
            ]
        )

    def _dense(self, layer: int, head: int) -> list[list[float]]:
        """The kept weights of a head, [Q][S], null keys first, and 0 where nothing was kept."""
        rows, null = self.store.rows(layer, head), self.store.null_keys
        weights = np.zeros((self.store.queries, null + self.store.queries))
        query = np.repeat(np.arange(self.store.queries), rows.length)
        weights[query, null + query - rows.distance] = rows.weight
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


def page_content(
    name: str,
    source: Mapping[str, str],
    *,
    report: Report,
    store: RowStore,
    tokens: Sequence[str],
    has_budget: bool,
    effects: Effects | None,
    live: Sequence[LiveHead],
    eps: float | None,
) -> PageContent:
    """What a page shows of the model called `name`, whose weights over the first `tokens` are in `store`."""
    from cda_cli.console import head_type, verdict
    from cda_cli.page import PageContent

    return PageContent(
        title=f"What {name} selects",
        report=report,
        store=store,
        labels=tokens,
        verdict=verdict(report, has_budget, effects),
        source=source,
        reads={(head.layer, head.head): pattern for head in report.heads if (pattern := head_type(head))},
        causal=effects.document() if effects else None,
        live=live,
        eps=eps,
        has_budget=has_budget,
    )


def _place(place: tuple[int, int], rows: int) -> dict[str, Any]:
    return {name: np.full(rows, number, np.int32) for name, number in zip(("layer", "head"), place, strict=True)}


def _columns(rows: list[dict[str, Any]]) -> Columns:
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


class TextTokenizer(Protocol):
    """A tokenizer of transformers, or another that has its two methods."""

    def encode(self, text: str) -> Sequence[int]: ...

    def decode(self, ids: list[int]) -> str: ...


InspectedModel = str | Path | LanguageModel | nn.Module


def inspect_model(
    model: InspectedModel,
    text: str,
    *,
    tokenizer: TextTokenizer | None,
    context: int | None,
    causal: bool,
    keep: float,
    budget: str | int,
    device: str,
    dtype: str,
    backend: str,
) -> SparsityReport:
    """Does what `cda_cli.inspect` says."""
    size = parse_size(budget)
    if isinstance(model, nn.Module):
        if causal:
            raise ConfigError(
                "causal checks take a run; import a model of transformers with cda import, or leave it out"
            )
        return _inspect_transformers(model, tokenizer, text, context, keep, size)
    if tokenizer is not None or context is not None:
        raise ConfigError("a run has its tokenizer and its context; leave tokenizer and context out")
    if not isinstance(model, LanguageModel):
        model = load_language_model(model, best=False, ema=False, device=device, dtype=dtype, backend=backend)
    return _inspect_ours(model, text, causal, keep, size)


def _inspect_ours(lm: LanguageModel, text: str, causal: bool, keep: float, budget: int) -> SparsityReport:
    restored, config = lm.restored, lm.config.model
    collector = RowCollector(config.depth, budget, keep)
    live = LiveCollector() if follows_from_scores(lm.model) else None
    watcher = ReportWatcher(config.attn_k, collector=collector, live=live)
    windows = _windows(lm.encoded(text), lm.tokenizer.ending, config.seq_len)
    examination = Examination(causal, Wanted.of_selection(lm.model) if causal else Wanted.parse((), (), ()))
    figures, effects = examination.run(restored, lm.dtype, watcher, lambda: windows)
    tokens = [lm.tokenizer.decode([int(token)]) for token in windows[0].inputs[0]]
    source = {"model": str(lm.path), "text": _digest(text), "attn_eps": lm.model.attention_eps}
    has_budget = lm.model.attention_rule.has_budget
    return SparsityReport(figures, collector.store(), tokens, source, has_budget, live, effects)


@torch.no_grad()
def _inspect_transformers(
    model: Any, tokenizer: TextTokenizer | None, text: str, context: int | None, keep: float, budget: int
) -> SparsityReport:
    """Inspects a model of transformers, where and as it is, in evaluation mode."""
    from cda_cli.observed_transformers import describe, observing

    if tokenizer is None:
        raise ConfigError("a model of transformers comes without its tokenizer; give tokenizer=")
    described = describe(model)
    collector = RowCollector(described.layers, budget, keep)
    watcher = ReportWatcher(described.largest_k, collector=collector)
    ids = np.array(tokenizer.encode(text))
    encoded = Encoded(ids, np.zeros(len(ids), np.uint8))  # Without losses no bytes are counted, nor the last target.
    ending = Encoded(*(each[-1:] for each in encoded))
    limits = [limit for limit in (context, described.context) if limit is not None]
    if not limits:
        raise ConfigError("the model takes any number of tokens; give context=, the tokens of a window")
    if min(limits) < 1:
        raise ConfigError(f"context is the tokens of a window, 1 or more, not {context}")
    windows = _windows(encoded, ending, min(limits))
    training = model.training
    model.eval()
    try:
        with observing(model, watcher.see, watcher.see_residual):
            for tokens_BT in (window.inputs.to(model.device) for window in windows):
                watcher.begin(tokens_BT)
                model(input_ids=tokens_BT, use_cache=False)
    finally:
        model.train(training)
    tokens = [tokenizer.decode([int(token)]) for token in windows[0].inputs[0]]
    source = {"model": described.name, "text": _digest(text), "attn_eps": described.eps}
    return SparsityReport(watcher.report(), collector.store(), tokens, source, described.has_budget)


def _windows(text: Encoded, ending: Encoded, context: int) -> list[Batch]:
    """The text in windows of one sequence each, whose inputs are all of its tokens; the last one reaches back.

    `ending` is the token that the last one predicts.
    """
    if not len(text.ids):
        raise ConfigError("the text is empty; give one token at least")
    return list(evaluation_batches(Tokens(*Encoded.join([text, ending]), text_bytes=0), context, 1))


def _digest(text: str) -> str:
    """What tells one text from another, in few characters."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
