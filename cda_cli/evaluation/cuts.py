"""Cuts: what each query reads is reduced to n keys, without training, to measure what the other keys were worth.

A cut hides all keys but n from each query of every attention layer. Its choice says which n keys stay: those with the
largest weights (`top`), or as controls the latest ones (`recent`), the first and the latest n − 1 (`sink`), random ones
(`random`), or those with the largest weights in the next head of the layer (`other-head`). Null keys stay: they are no
part of the text.

Shapes: B batch, H heads, t queries of a block, S keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cda_cli.errors import ConfigError, did_you_mean
from cda_cli.evaluation.comparison import Comparison, Estimate
from cda_cli.evaluation.evaluate import Evaluation
from cda_cli.evaluation.sums import AS_IT_IS, Way
from cda_cli.model import Rows, Transformer, editing


def _recent(rows: Rows) -> Tensor:
    return torch.arange(rows.scores.shape[-1], device=rows.scores.device).expand_as(rows.scores)


def _sink(rows: Rows) -> Tensor:
    """Many heads of a softmax put their weight on the first token when they have nothing to read.

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2309.17453.
    """
    latest = _recent(rows).clone()
    latest[..., rows.null_keys] = rows.scores.shape[-1]
    return latest


def _random(rows: Rows) -> Tensor:
    """Mixes the bits of head, query and key. All windows have the same numbers, whatever the batch and the device."""
    H, t, S = rows.scores.shape[1:]
    head, query, key = (torch.arange(size, device=rows.scores.device) for size in (H, t, S))
    query = query + rows.mask[0].sum()
    mixed = (head[:, None, None] * 2**42) ^ (query[:, None] * 2**21) ^ key
    for factor in (0x2545F4914F6CDD1D, 0x1B873593CC9E2D51):
        mixed = (mixed ^ (mixed >> 29)) * factor
    return ((mixed >> 32) & (2**24 - 1)).expand_as(rows.scores)


# How a choice ranks the keys of each row, [B, H, t, S]: the largest stay. A weight grows with its score under every
# rule, and scores also rank the keys that are capped.
CHOICES: dict[str, Callable[[Rows], Tensor]] = {
    "top": lambda rows: rows.scores,
    "recent": _recent,
    "sink": _sink,
    "random": _random,
    "other-head": lambda rows: rows.scores.roll(1, dims=1),
}
DROP = "drop"


@dataclass(frozen=True)
class Cut:
    """Keeps `keys` keys of each row, from which the rule computes the weights anew.

    With `drops`, they keep the weights that they had among all keys, so that the row loses the weights of the others.
    """

    choice: str
    keys: int
    drops: bool = False

    @property
    def description(self) -> str:
        return f"{self.choice} {self.keys}" + ", the rest dropped" * self.drops

    def __call__(self, rows: Rows) -> Tensor:
        """Returns the weights that remain, [B, H, t, S]."""
        is_key = rows.mask.clone()
        is_key[:, : rows.null_keys] = False
        ranks = CHOICES[self.choice](rows).to(torch.float32).masked_fill(~is_key, -torch.inf)
        kept = ranks.topk(min(self.keys, ranks.shape[-1]), -1).indices
        keep = torch.zeros_like(rows.scores, dtype=torch.bool).scatter(-1, kept, True) & is_key
        keep |= rows.mask & ~is_key
        return rows.weights(rows.mask).where(keep, 0.0) if self.drops else rows.weights(keep)


class CutEvaluation(NamedTuple):
    """What `evaluate` measures under a cut, and how far its bits per byte are above those without it."""

    cut: Cut
    evaluation: Evaluation
    difference: Estimate

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self.cut), **self.difference.as_difference(), **self.evaluation._asdict()}


def ways_of_cuts(model: Transformer, cuts: Sequence[Cut]) -> list[Way]:
    """Returns the ways to measure the model as it is, and under each of `cuts`."""
    return [AS_IT_IS, *(partial(editing, model, cut) for cut in cuts)]


def compared_cuts(comparison: Comparison, cuts: Sequence[Cut], base: int = 0) -> list[CutEvaluation]:
    """Compares each of `cuts` with the model as it is, which is the way `base` of `comparison`; the cuts follow it."""
    numbered = enumerate(cuts, start=base + 1)
    return [CutEvaluation(cut, comparison.evaluation(way), comparison.difference(way, base)) for way, cut in numbered]


def parse_cuts(given: Sequence[str]) -> list[Cut]:
    """Reads cuts such as "top:64", "random:8,16" or "top:16:drop". Raises ConfigError for what is none."""
    return [cut for text in given for cut in _parse(text)]


def _parse(text: str) -> list[Cut]:
    choice, _, rest = text.partition(":")
    numbers, _, end = rest.partition(":")
    if choice not in CHOICES:
        raise ConfigError(f"there is no cut {choice!r}: {did_you_mean(choice, CHOICES)}")
    keys = [int(number) if number.isascii() and number.isdigit() else 0 for number in numbers.split(",")]
    if end not in ("", DROP) or min(keys) < 1:
        raise ConfigError(f"--cut {text} is no cut; give a choice and numbers of keys, such as {choice}:64,16")
    return [Cut(choice, number, end == DROP) for number in keys]
