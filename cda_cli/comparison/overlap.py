"""Which heads of two models read the same keys of the same text, and how much they share.

The overlap of two rows is Σ_s min(p_s, q_s) over the keys s of the text, p and q their weights over their sums: 1 where
they read alike, 0 where no key is read by both. It is 1 minus the total variation distance. Mass on null keys, which
are no text, counts as not shared.

Heads have no order, so those of one model are aligned with those of the other: the assignment with the largest sum of
overlaps, of all heads in all layers. The best of many pairs would look better than it is on the text that it was chosen
on, so the assignment is made on every other window, and overlaps are reported of the rest.

Shapes: B batch, H heads, R rows that are kept of a window, S keys, N and M heads in all layers of a model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cda_cli.inspection import Watcher
from cda_cli.inspection.seen_rows import shares
from cda_cli.model import Transformer
from cda_cli.model.observe import ObservedAttention, ObservedFeedForward, observing

ROWS = 32  # of a window
KEPT_BYTES = 2**28  # of all windows and heads


class HeadPair(NamedTuple):
    """A head of the first model, the head of the other that it is aligned with, and their mean overlap."""

    layer: int
    head: int
    other_layer: int
    other_head: int
    overlap: float


class HeadOverlap(NamedTuple):
    """The aligned heads of two models. `any_two` is the mean overlap of all pairs of a head of each: the control.

    `rows` counts the rows of a head over which overlaps are means.
    """

    pairs: list[HeadPair]
    any_two: float
    rows: int

    @property
    def aligned(self) -> float:
        """The mean overlap of the aligned heads."""
        return sum(pair.overlap for pair in self.pairs) / len(self.pairs)

    def as_dict(self) -> dict[str, Any]:
        return {
            "aligned": self.aligned,
            "any_two": self.any_two,
            "rows": self.rows,
            "pairs": [pair._asdict() for pair in self.pairs],
        }


class SharesWatcher(Watcher):
    """Keeps p of the same queries of each window, for all heads of a model: `windows`, float16 [N, R, S] each.

    The queries are ROWS of each `context` tokens, or fewer where the weights of all `windows` would take too much
    memory. It sees windows one at a time.
    """

    def __init__(self, heads: int, context: int, windows: int) -> None:
        affordable = KEPT_BYTES // (2 * heads * context * windows)
        self.step = max(1, -(-context // max(1, min(ROWS, affordable))))
        self.heads, self.context = heads, context
        self.windows: list[Tensor] = []
        self._layers: dict[int, list[Tensor]] = defaultdict(list)

    @contextmanager
    def watching(self, model: Transformer) -> Iterator[None]:
        ends = model.register_forward_hook(lambda *_: self._end())
        try:
            with observing(model, self._see):
                yield
        finally:
            ends.remove()

    def _see(self, seen: ObservedAttention | ObservedFeedForward) -> None:
        if isinstance(seen, ObservedFeedForward):
            return
        position = seen.position + torch.arange(seen.weights.shape[2])
        chosen = torch.nonzero(position % self.step == self.step - 1).flatten()
        rows = shares(seen.weights[0, :, chosen.to(seen.weights.device)].float())[..., seen.null_keys :]
        self._layers[seen.layer].append(F.pad(rows, (0, self.context - rows.shape[-1])).half().cpu())

    def _end(self) -> None:
        self.windows.append(torch.cat([torch.cat(self._layers[layer], 1) for layer in sorted(self._layers)]))
        self._layers.clear()


def head_overlap(first: SharesWatcher, other: SharesWatcher, heads: tuple[int, int]) -> HeadOverlap | None:
    """Aligns the heads of two models that saw the same windows; `heads` are those of a layer of each.

    None where there are fewer than two windows, of which one aligns and the other measures.
    """
    sums = [torch.zeros(first.heads, other.heads, dtype=torch.float64) for _ in range(2)]
    rows = [0, 0]
    for number, (p_NRS, q_MRS) in enumerate(zip(first.windows, other.windows, strict=True)):
        sums[number % 2] += overlaps(p_NRS.float(), q_MRS.float())
        rows[number % 2] += p_NRS.shape[1]
    if not all(rows):
        return None
    chosen = best_assignment(sums[0].numpy())
    found = sums[1] / rows[1]
    pairs = [
        HeadPair(*divmod(i, heads[0]), *divmod(j, heads[1]), found[i, j].item())
        for i, j in enumerate(chosen)
        if j is not None
    ]
    return HeadOverlap(pairs, found.mean().item(), rows[1])


def overlaps(p_NRS: Tensor, q_MRS: Tensor) -> Tensor:
    """Σ over rows of Σ_s min(p, q), for each head of one and each of the other: float64 [N, M].

    As min(p, q) = (p + q − |p − q|) / 2, one call of a library has it for all pairs.
    """
    p, q = p_NRS.flatten(1), q_MRS.flatten(1)
    both = p.sum(1, dtype=torch.float64).unsqueeze(1) + q.sum(1, dtype=torch.float64)
    return (both - torch.cdist(p, q, p=1.0).double()) / 2


def best_assignment(gains: NDArray[np.float64]) -> list[int | None]:
    """Pairs rows with columns so that the sum of `gains` [N, M] is the largest: the column of each row.

    Each has at most one partner, and the smaller side is all paired; None is a row without one. This is the Hungarian
    method in the form of shortest augmenting paths (Crouse, On Implementing 2D Rectangular Assignment Algorithms,
    2016), in O(N²M) for N ≤ M.
    """
    if gains.shape[0] > gains.shape[1]:
        of_columns = best_assignment(gains.T)
        return [of_columns.index(row) if row in of_columns else None for row in range(len(gains))]
    costs = gains.max() - gains
    n, m = costs.shape
    row_price, column_price = np.zeros(n), np.zeros(m)
    row_at = np.full(m, -1)  # the row that each column is paired with
    for start in range(n):
        length, before = (
            np.full(m, np.inf),
            np.full(m, -1),
        )  # of the shortest path to each column, and the column before
        is_done = np.zeros(m, dtype=bool)
        row, column, reached = start, -1, 0.0
        while True:
            through = reached + costs[row] - row_price[row] - column_price
            shorter = ~is_done & (through < length)
            length[shorter], before[shorter] = through[shorter], column
            column = int(np.where(is_done, np.inf, length).argmin())
            is_done[column], reached = True, length[column]
            if row_at[column] < 0:
                break
            row = int(row_at[column])
        others = is_done & (row_at >= 0)
        row_price[start] += reached
        row_price[row_at[others]] += reached - length[others]
        column_price[is_done] -= reached - length[is_done]
        while True:  # each column of the path takes the row of the column before it
            previous = int(before[column])
            row_at[column] = start if previous < 0 else row_at[previous]
            if previous < 0:
                break
            column = previous
    return [int(column) for column in np.argsort(row_at)[m - n :]]
