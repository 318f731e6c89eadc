"""Which pages of keys a query of decoding reads, and a bound of what it leaves out with the others.

A page is PAGE neighbouring slots of a cache. The largest and the smallest number of its keys in each channel bound
every score in it: scale · Σ_d max(q_d · high_d, q_d · low_d) (Quest, arXiv 2406.10774). A query always reads the first
page, which has the null keys and those that many heads fall back on, and the newest one. Of the others it reads those
with the largest bounds. A key head chooses for all queries of its group.

What is left out. The weights of a rule with a threshold a are λ_i = min(1, exp((s_i + a)/ε)) with Σ λ_i = k; softmax
is k = 1. Let R be the keys that are read, a_R the threshold that they have alone, and μ_i their weights then.

1. a ≤ a_R. Under a_R the weights of R sum to k, so those of all keys sum to k or more, and this sum grows with a.
2. The row thus gives to the keys outside R the weight δ = Σ λ_i ≤ Σ min(1, exp((s_i + a_R)/ε)). With the bound u_p of
   the scores in a page that is not read, δ ≤ Σ_p size_p · min(1, exp((u_p + a_R)/ε)).
3. In R, μ_i ≥ λ_i by 1, and Σ (μ_i − λ_i) = k − (k − δ) = δ. The output of R thus differs from that of all keys by at
   most 2·δ·max|v|.

Where R has no more than k keys, a_R is +inf, every μ_i is 1, and 1 to 3 hold too. `mass_left_out` is the bound of δ/k,
the share of the row's weight; a row with fewer than k keys has their number in place of k. Like all weights, the bound
is computed in floating-point numbers, and true up to their rounding.

Shapes: B rows of a batch, K key heads, R queries of the group of a key head, S slots, D head width, P pages, N slots
that are read.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cda_cli.model.rules import AttentionRule

PAGE = 64  # slots
FIRST_AND_NEWEST = 2  # pages that are always read
PROBED = 4  # pages that give the first threshold

Slots = TypeVar("Slots", int, Tensor)


class KeySelection(NamedTuple):
    """How many keys a query reads: the pages that `max_keys` hold, two or more.

    None: as many pages as it takes until less than `tolerance`, a share of a row's weight, is left out for certain.
    These are at most twice the fewest for which it is certain, or PROBED. At tolerance 0 they are all pages.
    """

    max_keys: int | None
    tolerance: float = 0.0

    def holds(self, slots: int) -> bool:
        """Whether all keys are read, as there are no more than `slots`."""
        return self.max_keys is not None and page_count(slots) <= self.max_keys // PAGE


class Read(NamedTuple):
    """What is read: slots [B, K, N], whether the row has a key there, and the weights [B, K, R, N] of these keys alone.

    `threshold` [B, K, R] is theirs. `mass_left_out` [B, K] is the largest of the queries of a group.
    """

    slots: Tensor
    seen: Tensor
    weights: Tensor
    threshold: Tensor
    mass_left_out: Tensor


def page_count(slots: Slots) -> Slots:
    """The number of pages that so many slots begin."""
    return -(-slots // PAGE)


def take_slots(heads_BKSD: Tensor, slots_BKN: Tensor) -> Tensor:
    """Returns what stands in these slots, [B, K, N, D], for slots [B, K, N] or [B, 1, N].

    An index copies whole heads, where `gather` would look up each number.
    """
    B, K = heads_BKSD.shape[:2]
    rows = torch.arange(B, device=slots_BKN.device).view(B, 1, 1)
    return heads_BKSD[rows, torch.arange(K, device=slots_BKN.device).view(K, 1), slots_BKN]


class PageChoice:
    """One query of each row and head, query [B, K, R, D], times the scale of the scores, to choose pages for.

    Each row sees the first `keys_B` of its keys [B, K, S, D]. `budget` [B, K, R] is the k of the queries. `limits`
    [B, K, P, 2·D] has the largest number of each channel in each page, and then the smallest ones; what it has for
    pages that a row does not see must be finite.
    """

    def __init__(
        self, rule: AttentionRule, query: Tensor, key_BKSD: Tensor, keys_B: Tensor, budget: Tensor, limits: Tensor
    ) -> None:
        self.rule, self.query, self.key, self.keys_B, self.budget = rule, query, key_BKSD, keys_B, budget
        self.eps = rule.eps if rule.has_eps else 1.0
        pages = torch.arange(limits.shape[2], device=query.device)
        self.bounds_BKRP = torch.cat((query.clamp(min=0), query.clamp(max=0)), -1) @ limits.mT
        self.sizes_BP = (keys_B.unsqueeze(1) - PAGE * pages).clamp(0, PAGE)
        self.pages_BK = page_count(keys_B).unsqueeze(1).expand(limits.shape[:2])
        # Scores of queries compare once each query's largest bound is taken off.
        seen = self.bounds_BKRP.masked_fill(self.sizes_BP[:, None, None] == 0, -torch.inf)
        priority = (seen - seen.amax(-1, keepdim=True)).amax(2)
        always = (pages == 0) | (pages == self.pages_BK.unsqueeze(-1) - 1)
        self.order_BKP = priority.masked_fill(always, torch.inf).argsort(-1, descending=True)

    def read(self, selection: KeySelection) -> Read | None:
        """Reads the pages that are selected, or returns None where these are all pages of all rows."""
        if selection.max_keys is None:
            return self._read_within(selection.tolerance)
        most = selection.max_keys // PAGE
        if most >= self.order_BKP.shape[-1]:
            return None
        return self._read_pages(self.pages_BK.clamp(max=most), most)

    def _read_within(self, tolerance: float) -> Read | None:
        """Reads pages until less than `tolerance` is left out: what is left out under one threshold tells how many.

        More pages lower the threshold, so at most twice as many are read before it is computed again.
        """
        count_BK, most = self.pages_BK.clamp(max=PROBED), PROBED
        is_whole = self.order_BKP.shape[-1] <= PROBED
        while not is_whole:
            read = self._read_pages(count_BK, most)
            left_out = self._left_out(read.threshold)
            needed_BK = (left_out[..., :-1] >= tolerance).sum(-1).minimum(self.pages_BK)
            lacks_BK = needed_BK > count_BK
            count_BK = torch.where(lacks_BK, needed_BK.minimum(2 * count_BK), count_BK)
            is_whole, lacks, most = torch.stack(
                ((count_BK == self.pages_BK).all(), lacks_BK.any(), count_BK.amax())
            ).tolist()  # fmt: skip
            if not (lacks or is_whole):
                return read
        return None

    def _read_pages(self, count_BK: Tensor, most: int) -> Read:
        """Reads the first pages of the order: `count_BK`, at most `most` of them."""
        pages, S = self.order_BKP[..., :most], self.key.shape[2]
        places = torch.arange(most, device=pages.device)
        pages = torch.where(places < count_BK.unsqueeze(-1), pages, page_count(S))  # behind all slots
        slots = (pages.unsqueeze(-1) * PAGE + torch.arange(PAGE, device=pages.device)).flatten(2)
        seen = slots < self.keys_B.view(-1, 1, 1)
        slots = slots.clamp(max=S - 1)
        scores = self.query @ take_slots(self.key, slots).to(self.query.dtype).mT
        weights = self.rule.weights(scores, self.budget, seen.unsqueeze(2).expand_as(scores))
        # ε·log λ − s is the threshold where a weight is free, and no more than that where it is capped.
        threshold = (self.eps * weights.log() - scores).amax(-1)
        threshold = threshold.masked_fill(seen.sum(-1, keepdim=True) <= self.budget, torch.inf)
        left_out = self._left_out(threshold).take_along_dim(count_BK.unsqueeze(-1), 2).squeeze(-1)
        return Read(slots, seen, weights, threshold, left_out)

    def _left_out(self, threshold: Tensor) -> Tensor:
        """The mass that is left out where the first 0, 1, …, P pages of the order are read, [B, K, P + 1]."""
        largest = ((self.bounds_BKRP + threshold.unsqueeze(-1)) / self.eps).clamp(max=0).exp()
        mass = (self.sizes_BP[:, None, None] * largest).take_along_dim(self.order_BKP.unsqueeze(2), 3)
        left_out = F.pad(mass.flip(-1).cumsum(-1).flip(-1), (0, 1))
        share = left_out / self.budget.minimum(self.keys_B.view(-1, 1, 1)).unsqueeze(-1)
        return share.clamp(max=1).amax(2)
