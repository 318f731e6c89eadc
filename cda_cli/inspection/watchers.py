"""Watchers add up what each layer selects while forward passes are observed: for a report, or for training's records.

observed rows → figures of each row (`measures`) → sums of each layer → a report
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cda_cli.inspection.alarms import head_alarms
from cda_cli.inspection.collect_rows import RowCollector
from cda_cli.inspection.live_heads import LiveCollector
from cda_cli.inspection.measures import MEASURES, QUANTILES, RECORDED, Measure
from cda_cli.inspection.patterns import Distances, Sinks, median_distance
from cda_cli.inspection.report import HeadReport, LayerReport, Report
from cda_cli.inspection.residual import ResidualStream, watching_residual
from cda_cli.inspection.seen_rows import SeenRows
from cda_cli.inspection.statistics import Histogram, RowMeans, doubling_range
from cda_cli.inspection.units import UnitCensus, count_active
from cda_cli.model import Transformer
from cda_cli.model.observe import ObservedAttention, ObservedFeedForward, observing
from cda_cli.runs.records import HeadAlarm, LayerRecord

MOST_DRAWN = 64  # tokens of a map of weights, which labels them


class Watcher(ABC):
    """Adds up what it sees of forward passes."""

    @abstractmethod
    def watching(self, model: Transformer) -> AbstractContextManager[None]:
        """Within it, the watcher sees the forward passes of `model`."""


class Recorded(NamedTuple):
    """What each layer selects, and the heads that have stopped to select."""

    layers: tuple[LayerRecord, ...]
    alarms: tuple[HeadAlarm, ...]


class RecordWatcher(Watcher):
    """Adds up what training records of each layer, from one in `apart` queries.

    Nothing in it waits for a GPU before `recorded`.
    """

    def __init__(self, apart: int = 1) -> None:
        self.apart = apart
        self.attention: dict[int, RowMeans] = defaultdict(RowMeans)
        self.active: dict[int, Tensor] = {}
        self.units: dict[int, int] = {}
        self.blocks: dict[int, Tensor] = {}  # of layers with a router
        self.tokens = self.null_keys = 0  # of the latest window

    def watching(self, model: Transformer) -> AbstractContextManager[None]:
        return observing(model, self._see, self.apart)

    def _see(self, seen: ObservedAttention | ObservedFeedForward) -> None:
        if isinstance(seen, ObservedFeedForward):
            self.active[seen.layer], self.units[seen.layer] = count_active(seen.activations), seen.activations.shape[-1]
            if seen.chosen is not None:
                self.blocks[seen.layer] = seen.chosen.sum(-1).double().mean()
        else:
            _add(self.attention[seen.layer], SeenRows(seen), RECORDED)
            self.tokens, self.null_keys = seen.weights.shape[-1] - seen.null_keys, seen.null_keys

    def join(self, gather: Callable[[Any], list[Any]]) -> None:
        """Adds what other processes have seen of the same windows, where each saw as many positions of them.

        `gather` returns what each process gives it, in all of them.
        """
        layers = sorted(self.attention)
        means = {layer: (self.attention[layer].sums.cpu(), self.attention[layer].counts.cpu()) for layer in layers}
        counted = [{layer: of[layer].cpu() for layer in of} for of in (self.active, self.blocks)]
        seen = gather((means, counted, self.tokens))
        for layer in layers:
            together = self.attention[layer]
            together.sums, together.counts = (sum(each) for each in zip(*(of[layer] for of, *_ in seen), strict=True))
        for place, of in enumerate((self.active, self.blocks)):
            of.update({layer: torch.stack([counted[place][layer] for _, counted, _ in seen]).mean(0) for layer in of})
        self.tokens = max(tokens for *_, tokens in seen)

    def heads(self) -> dict[str, Tensor]:
        """Each measure of each head, float64 [L, H] on the CPU; 0 where no row has it, as of caps where none binds."""
        means = torch.stack([means.mean().nan_to_num(0.0) for _, means in sorted(self.attention.items())], 1)
        return dict(zip(RECORDED, means, strict=True))

    def recorded(self) -> Recorded:
        """What training records. Windows must have one length for the alarms to have a meaning."""
        heads = self.heads()
        of_layers = {name: figures.mean(-1).tolist() for name, figures in heads.items()}
        layers = tuple(
            LayerRecord(
                layer=layer,
                **{name: figures[place] for name, figures in of_layers.items()},
                active_units=self.active[layer].item() / self.units[layer],
                active_blocks=self.blocks[layer].item() if layer in self.blocks else None,
            )
            for place, layer in enumerate(sorted(self.attention))
        )
        return Recorded(layers, head_alarms(heads, self.tokens, self.null_keys))


class ReportWatcher(Watcher):
    """Adds up every measure. It also keeps the first weights of the layer and head `keep` over the first window.

    `largest_k` is the largest budget that a row may learn. `collector` and `live` see all rows of the first window.
    """

    def __init__(
        self,
        largest_k: float = 1.0,
        keep: tuple[int, int] | None = None,
        collector: RowCollector | None = None,
        live: LiveCollector | None = None,
    ) -> None:
        self.largest_k, self.keep, self.collector, self.live = largest_k, keep, collector, live
        self.attention: dict[int, _AttentionLayer] = defaultdict(_AttentionLayer)
        self.units: dict[int, UnitCensus] = defaultdict(UnitCensus)
        self.stream: dict[int, ResidualStream] = defaultdict(ResidualStream)
        self.tokens = self.windows = self._batches = 0
        self._tokens_BT: Tensor | None = None
        self._kept: list[Tensor] = []

    @contextmanager
    def watching(self, model: Transformer) -> Iterator[None]:
        begins = model.register_forward_pre_hook(lambda model, inputs: self.begin(inputs[0]))
        try:
            with observing(model, self.see), watching_residual(model, self.see_residual):
                yield
        finally:
            begins.remove()

    def begin(self, tokens_BT: Tensor) -> None:
        """Is called with the tokens of each forward pass, before the layers are seen."""
        self._tokens_BT = tokens_BT
        self.tokens += tokens_BT.numel()
        self.windows += len(tokens_BT)
        self._batches += 1

    def see(self, seen: ObservedAttention | ObservedFeedForward) -> None:
        """Adds rows of attention, or the activations of a feed-forward."""
        if isinstance(seen, ObservedFeedForward):
            self.units[seen.layer].add(seen)
            return
        self.attention[seen.layer].add(SeenRows(seen, self._tokens_BT))
        if self._batches == 1:
            if self.collector is not None:
                self.collector.add(seen)
            if self.live is not None:
                self.live.add(seen)
        if self.keep is not None and seen.layer == self.keep[0] and self._batches == 1:
            queries, keys = max(0, MOST_DRAWN - seen.position), seen.null_keys + MOST_DRAWN
            self._kept.append(seen.weights[0, self.keep[1], :queries, :keys].float().cpu())

    def see_residual(self, layer: int, x_BTC: Tensor) -> None:
        """Adds the output of a layer."""
        self.stream[layer].add(x_BTC)

    @property
    def kept(self) -> Tensor | None:
        """The weights [T, S] of `keep` over the first MOST_DRAWN tokens, or None if there is no `keep`."""
        return torch.cat(self._kept) if self._kept else None

    def report(self) -> Report:
        heads = {layer: rows.reports(layer, self.largest_k) for layer, rows in sorted(self.attention.items())}
        layers = [
            LayerReport(
                layer,
                self.units[layer].figures(),
                self.stream[layer].figures(),
                sum(head.measures["divergence"] for head in of_layer) / len(of_layer),
                self.units[layer].frequency(),
            )
            for layer, of_layer in heads.items()
        ]
        return Report([head for of_layer in heads.values() for head in of_layer], layers, self.tokens, self.windows)


class _AttentionLayer:
    """What is summed of one layer of attention."""

    def __init__(self) -> None:
        self.means, self.distances, self.sinks = RowMeans(), Distances(), Sinks()
        self.squares = RowMeans()  # of k, for its variance
        self.histograms = {name: Histogram(whole=name == "keys_95") for name in QUANTILES}

    def add(self, rows: SeenRows) -> None:
        figures = _add(self.means, rows, MEASURES)
        for name, histogram in self.histograms.items():
            histogram.add(figures[name])
        self.squares.add(rows.k.square().unsqueeze(0), rows.position)
        self.distances.add(rows)
        self.sinks.add(rows)

    def reports(self, layer: int, largest_k: float) -> list[HeadReport]:
        totals, means = (dict(zip(MEASURES, each, strict=True)) for each in (self.means.total(), self.means.mean()))
        shares, k = self.distances.shares(), self.histograms["sparsity_k"]
        measures = {
            **means,
            "sparsity_k_variance": (self.squares.mean()[0] - means["sparsity_k"].square()).clamp(min=0),
            "share_at_smallest_k": k.share_at(1.0),
            "share_at_largest_k": k.share_at(largest_k),
            "median_distance": median_distance(shares),
            **self.sinks.means(),
        }
        for name, chance in self.distances.chances().items():
            measures[f"{name}_lift"] = totals[f"{name}_share"] / chance
        quantiles = {name: histogram.quantiles() for name, histogram in self.histograms.items()}
        by_position = self.means.by_position()
        ranges = doubling_range(torch.arange(shares.shape[1]))
        mass = torch.zeros(len(shares), int(ranges.max()) + 1, dtype=torch.float64).index_add(1, ranges.long(), shares)
        return [
            HeadReport(
                layer,
                head,
                {name: figure[head].item() for name, figure in measures.items()},
                {name: of[head] for name, of in quantiles.items()},
                {name: of[head].tolist() for name, of in zip(MEASURES, by_position, strict=True)},
                mass[head].tolist(),
                {name: histogram.of_head(head) for name, histogram in self.histograms.items()},
            )
            for head in range(len(shares))
        ]


def _add(means: RowMeans, rows: SeenRows, measures: dict[str, Measure]) -> dict[str, Tensor]:
    """Adds the figures of `rows` to `means`, and returns them by name."""
    figures = {name: measure(rows) for name, measure in measures.items()}
    means.add(torch.stack(list(figures.values())), rows.position)
    return figures
