"""Collects the largest weights of each row while a window is inspected, and makes a `RowStore` of a given size.

a block of rows → its largest weights, on its device → all heads → as many keys of each head as the bytes allow

Shapes: H heads, t queries of a block, S keys (null keys first), M candidates of a row, Q queries, N kept keys.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cda_cli.errors import ConfigError
from cda_cli.inspection.row_codes import OCTAVES, SMALLEST, STEPS, Numbers, RowArrays, deflate, encode
from cda_cli.inspection.seen_rows import CAPPED_WEIGHT
from cda_cli.inspection.store import RowStore, StoredHead, thumbnail_side
from cda_cli.model.observe import ObservedAttention
from cda_cli.plurals import counted

ROW_BYTES = 24  # A row gets so many bytes at least, or else the last queries of the window are left out.
HEAD_BYTES = 512  # what a head takes besides rows and thumbnail, at most: its description in the header
ENOUGH = 0.99  # of the budget: a store of so many bytes is large enough
KEY_BYTES = 0.5  # No more keys are collected than fit into the budget at so few bytes each.


@dataclass
class _Head:
    """The candidates of one head. Arrays of each row are [Q], and of each candidate [N], as in `RowArrays`.

    `rank` is a candidate's place among the weights of its row, the largest at 0, and `row` its query. `total` is Σλ.
    """

    thumbnail: bytes
    encoded: dict[int, StoredHead]  # by the most keys of a row
    k: Numbers
    total: Numbers
    octave: Numbers
    row: Numbers
    distance: Numbers
    weight: Numbers
    rank: Numbers

    def marginal_mass(self) -> Numbers:
        """The mean share of the mass, over rows, that the n-th largest weight adds, at index n − 1; it falls with n."""
        return np.bincount(self.rank, self.weight / self.total[self.row]) / len(self.total)


class RowCollector:
    """Sees the blocks of rows of the first sequence of a batch, for each of `layers` layers in order.

    Of each row it takes the largest weights, until they have the share `keep` of its mass. The store will take `budget`
    bytes or fewer. It has the heads `only`, each by layer and head, or all of them.
    """

    def __init__(
        self, layers: int, budget: int, keep: float = 0.99, only: Collection[tuple[int, int]] | None = None
    ) -> None:
        if not 0 < keep <= 1:
            raise ConfigError(f"keep is the share of the mass that is kept, above 0 and at most 1, not {keep}")
        self.layers, self.budget, self.keep, self.only = layers, budget, keep, only
        self.tokens = self.queries = self.null_keys = self.most_keys = 0
        self._blocks: dict[tuple[int, int], list[list[Numbers]]] = {}  # by layer and head
        self._cells: dict[int, Tensor] = {}

    def add(self, seen: ObservedAttention) -> None:
        """Adds a block of rows."""
        if not self.tokens:
            self._begin(seen)
        t = min(seen.weights.shape[2], self.queries - seen.position)
        if t <= 0:
            return
        weights, k = seen.weights[0, :, :t].float(), seen.sparsity_k[0, :, :t]
        self._add_cells(weights, seen)
        chosen = [head for head in range(len(weights)) if self.only is None or (seen.layer, head) in self.only]
        if self.only is not None:
            weights, k = weights[chosen], k[chosen]
        for head, block in zip(chosen, self._largest(weights, k, seen), strict=True):
            self._blocks.setdefault((seen.layer, head), []).append(block)

    def _begin(self, seen: ObservedAttention) -> None:
        H, S = seen.weights.shape[1], seen.weights.shape[-1]
        self.null_keys, self.tokens = seen.null_keys, S - seen.null_keys
        heads = self.layers * H if self.only is None else len(self.only)
        cells = thumbnail_side(self.tokens) ** 2
        for_rows = self.budget - heads * (HEAD_BYTES + cells)
        self.queries = min(self.tokens, for_rows // (heads * ROW_BYTES))
        if self.queries < 1:
            least = heads * (HEAD_BYTES + cells + ROW_BYTES)
            rows = f"the rows of {counted(heads, 'head')}"
            raise ConfigError(f"{rows} take {least} bytes at least; give a budget of that or more")
        most = int(self.budget / KEY_BYTES / (heads * self.queries))
        self.most_keys = min(most, S)

    def _largest(self, weights_HtS: Tensor, k_Ht: Tensor, seen: ObservedAttention) -> list[list[Numbers]]:
        """The candidates of each head of a block: the arrays of `_Head` from k on."""
        total = weights_HtS.sum(-1, dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny)
        weight, key = weights_HtS.topk(self.most_keys)
        mass = weight.cumsum(-1, dtype=torch.float64)
        free = torch.where(weight < CAPPED_WEIGHT, weight, 0.0).amax(-1)
        octave = torch.where(free > 0, -free.log2(), 0.0).floor()
        is_kept = (mass - weight < self.keep * total.unsqueeze(-1)) & (weight > 0)
        is_kept &= weight >= SMALLEST * torch.exp2(-octave).unsqueeze(-1)
        query = seen.position + torch.arange(weight.shape[1], device=weight.device)
        distance = (query + seen.null_keys).unsqueeze(1) - key
        rank = torch.arange(weight.shape[-1], device=weight.device).expand_as(key)
        order = distance.argsort(-1)
        is_kept, weight, distance, rank = (each.gather(-1, order) for each in (is_kept, weight, distance, rank))
        rows = query.unsqueeze(1).expand_as(rank)
        of_rows = (k_Ht.double(), total, octave.to(torch.uint8))
        of_keys = (rows.int(), distance.int(), weight, rank.int())
        return [
            [each[head].cpu().numpy() for each in of_rows]
            + [each[head][is_kept[head]].cpu().numpy() for each in of_keys]
            for head in range(len(weight))
        ]

    def _add_cells(self, weights_HtS: Tensor, seen: ObservedAttention) -> None:
        """Adds the largest weight of each cell to the thumbnails. Null keys have no cell."""
        n, (H, t, _) = thumbnail_side(self.queries), weights_HtS.shape
        keys = weights_HtS[..., seen.null_keys : seen.null_keys + self.queries]
        cell = torch.arange(self.queries, device=keys.device) * n // self.queries
        across = keys.new_zeros(H, t, n).scatter_reduce_(2, cell.expand_as(keys), keys, "amax")
        cells = self._cells.setdefault(seen.layer, keys.new_zeros(H, n, n))
        down = cell[seen.position : seen.position + t].unsqueeze(1).expand_as(across)
        cells.scatter_reduce_(1, down, across, "amax")

    def store(self) -> RowStore:
        """Returns the store, of `budget` bytes or fewer, and forgets the rows.

        Raises ConfigError if no layer of attention was seen.
        """
        if not self._blocks:
            raise ConfigError("no attention was seen, so there are no rows to store")
        heads = {
            (layer, head): _Head(
                _thumbnail(self._cells[layer][head]), {}, *map(np.concatenate, zip(*blocks, strict=True))
            )
            for (layer, head), blocks in sorted(self._blocks.items())
        }
        self._blocks.clear()
        marginal = {key: head.marginal_mass() for key, head in heads.items()}
        # A key is kept if the mean over rows of what a key of its rank adds is at least a threshold, the same for all
        # heads. So each further byte goes to the head in which it holds the most mass.
        thresholds = np.unique(np.concatenate([[np.inf], *marginal.values()]))[::-1]

        def stored(index: int) -> RowStore:
            most = {key: max(1, int((mass >= thresholds[index]).sum())) for key, mass in marginal.items()}
            return RowStore(
                self.tokens,
                self.queries,
                self.null_keys,
                self.keep,
                [self._encoded(*key, head, most[key]) for key, head in heads.items()],
            )

        best, fits, end = stored(0), 0, len(thresholds)
        middle = end - 1  # Often everything fits.
        while fits < middle and len(best.to_bytes()) < ENOUGH * self.budget:
            candidate = stored(middle)
            if len(candidate.to_bytes()) <= self.budget:
                best, fits = candidate, middle
            else:
                end = middle
            middle = (fits + end) // 2
        return best

    def _encoded(self, layer: int, number: int, head: _Head, most_keys: int) -> StoredHead:
        if most_keys not in head.encoded:
            chosen = head.rank < most_keys
            row, weight = head.row[chosen], head.weight[chosen]
            count, kept = np.bincount(row, minlength=self.queries), np.bincount(row, weight, self.queries)
            bound = np.minimum(head.k, np.arange(self.queries) + 1 + self.null_keys)
            rest = ((head.total - kept) / bound).clip(0, 1)
            rows = RowArrays(count, head.k, rest, head.octave, head.distance[chosen], weight, weight >= CAPPED_WEIGHT)
            limits = float(head.k.min()), float(head.k.max())
            share = float((kept / head.total).mean())
            stream = encode(rows, *limits)
            head.encoded[most_keys] = StoredHead(layer, number, most_keys, share, *limits, stream, head.thumbnail)
        return head.encoded[most_keys]


def _thumbnail(cells: Tensor) -> bytes:
    """The stream of a coarse map [n, n], as codes: the weights of rows with octave 0, and 0 for what is smaller."""
    steps = (STEPS + (cells.log2() * STEPS / OCTAVES).round()).clamp(0, STEPS)
    return deflate(torch.where(cells >= CAPPED_WEIGHT, 255, steps).to(torch.uint8).cpu().numpy().tobytes())
