"""Cuts: what each token reads is reduced to n keys or units, to measure what the others were worth.

A cut of keys hides all but n from each query of every attention layer. Its choice says which n stay: those with the
largest weights (`top`), or as controls the latest ones (`recent`), the first and the latest n − 1 (`sink`), those at
the offsets that another query of the head chose (`distance-matched`), random ones (`random`), or those with the largest
weights in the next head of the layer (`other-head`). Null keys stay: they are no part of the text.

A cut of units sets all but n units of each feed-forward layer to zero: all but those that add the longest vectors
(`units`), or as a control all but n random ones, scaled so that what they add is as long (`random-units`).

Shapes: B batch, H heads, t queries of a block or tokens of a piece, S keys, T tokens, F units, C width of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cda_cli.causal.interventions import Intervention, doubled, edited
from cda_cli.errors import ConfigError, did_you_mean
from cda_cli.model import Rows, Transformer


def _mixed(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """Mixes three numbers below 2²¹ to one of 24 random bits, the same on every device."""
    mixed = (first * 2**42) ^ (second * 2**21) ^ third
    for factor in (0x2545F4914F6CDD1D, 0x1B873593CC9E2D51):
        mixed = (mixed ^ (mixed >> 29)) * factor
    return (mixed >> 32) & (2**24 - 1)


def _indices(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the numbers of the heads [H, 1, 1], of the keys at which the queries stand [t, 1], and of the keys."""
    H, t, S = rows.scores.shape[1:]
    head, query, key = (torch.arange(size, device=rows.scores.device) for size in (H, t, S))
    return head[:, None, None], (query + rows.first)[:, None], key


def _recent(rows: Rows, n: int) -> Tensor:
    return _indices(rows)[2].expand_as(rows.scores)


def _sink(rows: Rows, n: int) -> Tensor:
    """Many heads of a softmax put their weight on the first token when they have nothing to read.

    Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2309.17453.
    """
    latest = _recent(rows, n).clone()
    latest[..., rows.null_keys] = rows.scores.shape[-1]
    return latest


def _random(rows: Rows, n: int) -> Tensor:
    """All windows have the same numbers, whatever the batch and the device."""
    head, query, key = _indices(rows)
    return _mixed(head, query + 1, key).expand_as(rows.scores)


def _distance_matched(rows: Rows, n: int) -> Tensor:
    """Ranks the keys of a query as another query of the head ranks those that lie as far back from itself.

    The other query is any of the sequence that sees at least n keys, and half as many as the query. An offset that
    reaches before the first key is passed over for the next best.
    """
    head, query, key = _indices(rows)
    null, S = rows.null_keys, rows.scores.shape[-1]
    sees = ((query - null + 2) // 2).clamp(min=min(n, S - null))  # of the first query that is drawn from
    earliest = null + sees - 1
    other = earliest + _mixed(head, query, torch.zeros_like(query)) % (S - 1 - earliest).clamp(min=1)  # [H, t, 1]
    other = torch.where((query >= earliest) & (other >= query), other + 1, other).clamp(max=S - 1)
    source = other - (query - key)  # [H, t, S], the key that lies as far back from the other query
    scores = rows.scores_of(other.squeeze(-1))
    there = scores.gather(-1, source.clamp(null, S - 1).expand_as(scores))
    return there.masked_fill(source < null, torch.finfo(there.dtype).min)


# How a choice ranks the keys of each row, [B, H, t, S], where n stay: the largest stay. A weight grows with its score
# under every rule, and scores also rank the keys that are capped.
TOP = "top"
CHOICES: dict[str, Callable[[Rows, int], Tensor]] = {
    TOP: lambda rows, n: rows.scores,
    "recent": _recent,
    "sink": _sink,
    "distance-matched": _distance_matched,
    "random": _random,
    "other-head": lambda rows, n: rows.scores.roll(1, dims=1),
}
CURVE, DROP = "curve", "drop"
LONGEST_CURVE = 256  # keys of a curve whose end is not given
PIECE = 2**24  # activations of units that are ranked at a time


@dataclass(frozen=True)
class Cut(Intervention):
    """Keeps `keys` keys of each row, from which the rule computes the weights anew.

    With `drops`, they keep the weights that they had among all keys, so that the row loses the weights of the others.
    """

    kind = "cuts"
    choice: str
    keys: int
    drops: bool = False

    @property
    def series(self) -> str:
        """The cuts that differ only in the number of keys."""
        return f"{self.choice}-{DROP}" if self.drops else self.choice

    @property
    def name(self) -> str:
        return f"{self.series}[{self.keys}]"

    @property
    def description(self) -> str:
        return f"{self.choice} {self.keys}" + ", the rest dropped" * self.drops

    def applied(self, model: Transformer) -> AbstractContextManager[nn.Module]:
        return edited(model, rows=self)

    def fields(self) -> dict[str, Any]:
        return {"choice": self.choice, "keys": self.keys, "drops": self.drops}

    @property
    def kept(self) -> int:
        return self.keys

    def __call__(self, rows: Rows) -> Tensor:
        """Returns the weights that remain, [B, H, t, S]."""
        keep = rows.largest(CHOICES[self.choice](rows, self.keys), self.keys)
        return rows.weights(rows.mask).where(keep, 0.0) if self.drops else rows.weights(keep)


@dataclass(frozen=True)
class UnitCut(Intervention):
    """Keeps `units` units of each feed-forward layer on each token, and sets the others to zero.

    They are those that add the longest vectors |a_f|·‖w_f‖ to the residual stream, or with `is_random` any, times a
    factor with which what they add together is as long.
    """

    kind = "unit_cuts"
    units: int
    is_random: bool = False

    @property
    def series(self) -> str:
        return UNITS[self.is_random]

    @property
    def name(self) -> str:
        return f"{self.series}[{self.units}]"

    @property
    def description(self) -> str:
        return f"{self.series} {self.units}"

    def applied(self, model: Transformer) -> AbstractContextManager[nn.Module]:
        out = [block.feed_forward.proj_out.weight for block in model.each_block()]
        return edited(model, units=partial(self._edit, out))

    def fields(self) -> dict[str, Any]:
        return {"choice": self.series, "units": self.units}

    @property
    def kept(self) -> int:
        return self.units

    def _edit(self, out: list[Tensor], layer: int, units_BTF: Tensor) -> Tensor:
        B, T, F = units_BTF.shape
        pieces = torch.arange(T, device=units_BTF.device).split(max(1, PIECE // (B * F)))
        return torch.cat([self._edit_piece(out[layer], layer, units_BTF[:, piece], piece) for piece in pieces], 1)

    def _edit_piece(self, out_CF: Tensor, layer: int, units_BtF: Tensor, token_t: Tensor) -> Tensor:
        B, _, F = units_BtF.shape
        count = min(self.units, F)
        longest = _only(units_BtF, (units_BtF.abs() * out_CF.norm(dim=0)).topk(count, -1).indices)
        if not self.is_random:
            return longest
        unit = torch.arange(F, device=token_t.device)
        ranks_tF = _mixed(torch.full_like(unit, layer), token_t[:, None], unit)
        drawn = _only(units_BtF, ranks_tF.topk(count, -1).indices.expand(B, -1, -1))
        wanted, found = ((each @ out_CF.to(each.dtype).T).norm(dim=-1, keepdim=True) for each in (longest, drawn))
        return drawn * torch.where(found > 0, wanted / found, 1.0).to(drawn.dtype)


def _only(units: Tensor, kept: Tensor) -> Tensor:
    """Returns `units` [B, T, F] at the indices `kept` [B, T, n] of the last dimension, and zero elsewhere."""
    return torch.zeros_like(units).scatter(-1, kept, units.gather(-1, kept))


UNITS = ("units", "random-units")  # what keeps the largest units, and its control


def parse_cuts(given: Sequence[str]) -> list[Cut | UnitCut]:
    """Reads cuts such as "top:64", "random:8,16", "top:16:drop", "units:1..64", or "curve", all choices of keys.

    Raises ConfigError for what is no cut.
    """
    return [cut for text in given for cut in _parse(text)]


def _parse(text: str) -> list[Cut | UnitCut]:
    choice, _, rest = text.partition(":")
    known = [*CHOICES, *UNITS, CURVE]
    if choice not in known:
        raise ConfigError(f"there is no cut {choice!r}: {did_you_mean(choice, known)}")
    if choice == CURVE and not rest:
        rest = f"1..{LONGEST_CURVE}"
    numbers, _, end = rest.partition(":")
    counts = [count for part in numbers.split(",") for count in _counts(part)]
    if end not in ("", DROP) or min(counts) < 1:
        raise ConfigError(
            f"--cut {text} is no cut; give a choice and numbers, such as {choice}:64,16 or {choice}:1..64"
        )
    if choice in UNITS:
        if end:
            raise ConfigError(
                f"--cut {text} is no cut: units that are cut have no others to share with; leave :{DROP} out"
            )
        return [UnitCut(count, choice == UNITS[1]) for count in counts]
    return [Cut(one, count, end == DROP) for one in (CHOICES if choice == CURVE else (choice,)) for count in counts]


def _counts(text: str) -> list[int]:
    """Reads "64", or "1..64", which is 1, 2, 4 … 64; [0] for what is neither."""
    first, dots, last = text.partition("..")
    if not all(number.isascii() and number.isdigit() for number in (first, last if dots else first)):
        return [0]
    if not dots:
        return [int(first)]
    return doubled(int(first), int(last)) if 0 < int(first) <= int(last) else [0]
