"""Ablation of attention heads: the output of a head is replaced by its mean, and what is measured of a head is compared
with what its ablation costs.

Shapes: L layers, H heads, D head width, B batch, T tokens, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cda_cli.causal.interventions import Intervention, doubled, edited
from cda_cli.data import Batch
from cda_cli.errors import ConfigError, did_you_mean
from cda_cli.inspection import RecordWatcher, gradients, inspect
from cda_cli.model import Transformer, editing

HEADS, RANDOM, GRADIENT = "heads", "random", "gradient"
# What may say how much a head matters, from what is inspected of it. Two more orders are RANDOM, the control, and
# GRADIENT, E|∂L/∂ξ| for a factor ξ on the output of the head.
MEASURES = {"support": "effective_support", "capped": "capped_share", "k": "sparsity_k"}
ORDERS = (*MEASURES, GRADIENT, RANDOM)


class HeadStatistics(NamedTuple):
    """The mean output of each head over the tokens of a text, [L, H, D], and measures of each head, [L, H]."""

    means: Tensor
    measures: dict[str, Tensor]


@dataclass(frozen=True)
class HeadAblation(Intervention):
    """Some heads have their mean output, on every token, in place of the one that they compute.

    `called` and `words` are its name and description, `chosen` is bool [L, H], and `means` is [L, H, D]. `place` says
    which heads these are, by the names in JSON, and `measured` what is known of a single one.
    """

    called: str
    words: str
    chosen: Tensor
    means: Tensor
    place: dict[str, Any]
    measured: dict[str, float]

    @property
    def kind(self) -> str:
        return "ablations" if self.measured else "cumulative_ablations"

    @property
    def name(self) -> str:
        return self.called

    @property
    def description(self) -> str:
        return self.words

    def applied(self, model: Transformer) -> AbstractContextManager[nn.Module]:
        return edited(model, heads=self._edit)

    def fields(self) -> dict[str, Any]:
        return {**self.place, **self.measured}

    def columns(self) -> dict[str, str]:
        return {name: f"{value:.3g}" for name, value in self.measured.items()}

    def _edit(self, layer: int, heads_BTHD: Tensor) -> Tensor:
        return torch.where(self.chosen[layer].unsqueeze(-1), self.means[layer].to(heads_BTHD.dtype), heads_BTHD)


def measure_heads(
    model: Transformer,
    open_batches: Callable[[], Iterable[Batch]],
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda windows: None,
) -> HeadStatistics:
    """Measures the heads in two passes over the batches, one of them with gradients."""
    H, D = model.config.heads, model.config.head_width
    sums = torch.zeros(model.config.depth, H, D, dtype=torch.float64, device=device)
    tokens = 0

    def add(layer: int, heads_BTHD: Tensor) -> Tensor:
        nonlocal tokens
        sums[layer] += heads_BTHD.sum((0, 1), dtype=torch.float64)
        tokens += heads_BTHD.shape[:2].numel() * (layer == 0)
        return heads_BTHD

    watcher = RecordWatcher()
    with editing(model, heads=add):
        inspect(model, open_batches(), device, dtype, watcher, advance)
    found = watcher.heads()
    measures = {name: found[measure] for name, measure in MEASURES.items()}
    measures[GRADIENT] = gradients(model, open_batches(), device, dtype, advance).heads.cpu()
    return HeadStatistics((sums / tokens).float(), measures)


def parse_ablations(given: Sequence[str]) -> list[str | None]:
    """Reads "heads", which is None, or an order of the heads, as in "heads:support,random".

    Raises ConfigError for what is neither.
    """
    return [order for text in given for order in _parse(text)]


def _parse(text: str) -> list[str | None]:
    what, colon, orders = text.partition(":")
    if what != HEADS:
        raise ConfigError(f"--ablate {text} is unknown: {did_you_mean(what, [HEADS])}")
    if not colon:
        return [None]
    for order in orders.split(","):
        if order not in ORDERS:
            raise ConfigError(f"there is no order {order!r} of heads: {did_you_mean(order, ORDERS)}")
    return list(orders.split(","))


def ablations(orders: Sequence[str | None], statistics: HeadStatistics) -> list[HeadAblation]:
    """Makes the ablation of each single head for None, and those of 1, 2, 4 … heads in each order.

    An order takes the heads with the smallest values of the measure first. Raises ConfigError if all heads have one
    value.
    """
    made = []
    for order in orders:
        made += _each_head(statistics) if order is None else _cumulative(order, statistics)
    return made


def count_ablations(orders: Sequence[str | None], heads: int) -> int:
    """Returns how many ablations `ablations` makes of a model with so many heads."""
    return sum(heads if order is None else len(doubled(1, heads)) for order in set(orders))


def _each_head(statistics: HeadStatistics) -> list[HeadAblation]:
    L, H, _ = statistics.means.shape
    made = []
    for layer in range(L):
        for head in range(H):
            chosen = torch.zeros(L, H, dtype=torch.bool)
            chosen[layer, head] = True
            measured = {name: each[layer, head].item() for name, each in statistics.measures.items()}
            place = {"layer": layer, "head": head}
            made.append(
                _ablation(f"head[{layer}.{head}]", f"without head {layer}.{head}", chosen, statistics, place, measured)
            )
    return made


def _cumulative(order: str, statistics: HeadStatistics) -> list[HeadAblation]:
    shape = statistics.means.shape[:2]
    if order == RANDOM:
        ranks = torch.randperm(shape.numel(), generator=torch.Generator().manual_seed(0)).view(shape)
    else:
        values = statistics.measures[order]
        if values.numel() > 1 and values.min() == values.max():
            raise ConfigError(f"all heads have the same {order}, which puts them in no order; take another order")
        ranks = values.flatten().argsort(stable=True).argsort().view(shape)
    counts = doubled(1, shape.numel())
    return [
        _ablation(
            f"heads-by-{order}[{count}]",
            f"without {count} by {order}",
            ranks < count,
            statistics,
            {"order": order, "heads": count},
            {},
        )
        for count in counts
    ]


def _ablation(
    name: str,
    description: str,
    chosen: Tensor,
    statistics: HeadStatistics,
    place: dict[str, Any],
    measured: dict[str, float],
) -> HeadAblation:
    means = statistics.means
    return HeadAblation(name, description, chosen.to(means.device), means, place, measured)


def rank_correlation(one: Tensor, other: Tensor) -> float:
    """Returns Spearman's rank correlation of two vectors, NaN if either is constant. Equal values share their rank."""
    ranks = []
    for values in (one, other):
        _, place, count = values.unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0) - (count - 1) / 2)[place].double())
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()
