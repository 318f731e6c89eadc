"""What each layer and head of a model selects, over real text.

windows of the text → observed forward passes → sums of measures → a report, and the weights of one head over the first
window, for the heat map.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cda_cli.data import Batch
from cda_cli.errors import ConfigError
from cda_cli.inspection.measures import HeadSums, UnitCounts, count_active_units, sum_head_measures
from cda_cli.model import Transformer
from cda_cli.model.observe import ObservedAttention, ObservedFeedForward, observing
from cda_cli.runs.records import LayerRecord
from cda_cli.runtime import autocast, to_device


class HeadReport(NamedTuple):
    """Means over the rows of one head; `capped_share` is the mean over the rows that see more than k keys."""

    layer: int
    head: int
    sparsity_k: float
    row_sum: float
    row_sum_error: float
    effective_support: float
    attended_entries: float
    capped_share: float
    distance_back: float


class FeedForwardReport(NamedTuple):
    """The units of one feed-forward layer.

    `active_units` is the mean number of units with |activation| > 1e-3 on a token. `dead_units` were active on no
    token.
    """

    layer: int
    units: int
    active_units: float
    dead_units: int


class Report(NamedTuple):
    heads: list[HeadReport]
    feed_forward: list[FeedForwardReport]
    tokens: int

    def only(self, layers: Collection[int], heads: Collection[int]) -> Report:
        """Keeps these layers and heads alone."""
        return Report(
            [head for head in self.heads if head.layer in layers and head.head in heads],
            [unit for unit in self.feed_forward if unit.layer in layers],
            self.tokens,
        )

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "heads": [head._asdict() for head in self.heads],
            "feed_forward": [unit._asdict() for unit in self.feed_forward],
        }


def parse_selection(text: str | None, count: int, option: str) -> list[int]:
    """Reads numbers and ranges below `count`: `0,2-3` gives [0, 2, 3], and None gives all of them.

    `option` names what was given, for the ConfigError that is raised for anything else.
    """
    if text is None:
        return list(range(count))
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            lowest, highest = int(first), int(last if dash else first)
        except ValueError as error:
            raise ConfigError(f"{option} takes numbers and ranges such as 0,2-3, not {text!r}") from error
        if not 0 <= lowest <= highest < count:
            raise ConfigError(f"{option} {text} is out of range; this model has 0 to {count - 1}")
        chosen += range(lowest, highest + 1)
    return chosen


class Watcher:
    """Adds up the measures of each layer while forward passes are observed.

    It also keeps the weights of the layer and head `keep` over the first sequence.
    """

    def __init__(self, keep: tuple[int, int] | None = None) -> None:
        self.attention: dict[int, HeadSums] = {}
        self.feed_forward: dict[int, UnitCounts] = {}
        self.keep = keep
        self._kept: list[Tensor] = []

    def __call__(self, seen: ObservedAttention | ObservedFeedForward) -> None:
        if isinstance(seen, ObservedFeedForward):
            counts = count_active_units(seen.activations)
            known = self.feed_forward.get(seen.layer)
            self.feed_forward[seen.layer] = known + counts if known else counts
            return
        sums = sum_head_measures(seen)
        before = self.attention.get(seen.layer)
        self.attention[seen.layer] = before + sums if before else sums
        if self.keep is not None and seen.layer == self.keep[0] and seen.position == sum(map(len, self._kept)):
            self._kept.append(seen.weights[0, self.keep[1]].float().cpu())

    @property
    def kept(self) -> Tensor | None:
        """The weights [T, S] of `keep` over the first sequence, or None if there is no `keep`."""
        return torch.cat(self._kept) if self._kept else None

    def report(self) -> Report:
        heads = [
            _head_report(layer, head, dict(zip(HeadSums._fields, sums, strict=True)))
            for layer, of_heads in sorted(self.attention.items())
            for head, sums in enumerate(torch.stack(of_heads, dim=-1).tolist())
        ]
        units = [_unit_report(layer, counts) for layer, counts in sorted(self.feed_forward.items())]
        return Report(heads, units, self.feed_forward[0].tokens if self.feed_forward else 0)


def layer_means(report: Report) -> tuple[LayerRecord, ...]:
    """Returns what training records of each layer: the means over its heads, and its share of active units."""
    layers = []
    for unit in report.feed_forward:
        heads = [head for head in report.heads if head.layer == unit.layer]
        means = {
            name: sum(getattr(head, name) for head in heads) / len(heads)
            for name in ("sparsity_k", "effective_support", "capped_share", "distance_back")
        }
        layers.append(LayerRecord(layer=unit.layer, **means, active_units=unit.active_units / unit.units))
    return tuple(layers)


@torch.no_grad()
def inspect(
    model: Transformer,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    keep: tuple[int, int] | None = None,
    advance: Callable[[int], None] = lambda windows: None,
) -> Watcher:
    """Observes `model` over `batches`, in evaluation mode, and restores the mode of the model.

    `dtype` is that of the matrix products. `advance` gets the number of windows of each batch once it is done.
    """
    watcher = Watcher(keep)
    training = model.training
    model.eval()
    try:
        with observing(model, watcher):
            for batch in batches:
                with autocast(device, dtype):
                    model(to_device(batch.inputs, device))
                advance(len(batch.inputs))
    finally:
        model.train(training)
    return watcher


def _head_report(layer: int, head: int, sums: dict[str, float]) -> HeadReport:
    mean = {name: value / sums["rows"] for name, value in sums.items()}
    bounded = sums["bounded_rows"]
    return HeadReport(
        layer=layer,
        head=head,
        sparsity_k=mean["sparsity_k"],
        row_sum=mean["row_sum"],
        row_sum_error=mean["excess"],
        effective_support=mean["support"],
        attended_entries=mean["attended"],
        capped_share=sums["capped_share"] / bounded if bounded else 0.0,
        distance_back=mean["distance"],
    )


def _unit_report(layer: int, counts: UnitCounts) -> FeedForwardReport:
    times_active = counts.times_active.cpu()
    return FeedForwardReport(
        layer=layer,
        units=len(times_active),
        active_units=times_active.sum().item() / counts.tokens,
        dead_units=int((times_active == 0).sum()),
    )
