"""Decoding that reads some pages of a cache, by bounds of the scores in each (see `page_choice`).

Shapes: L layers, B rows of a batch, H heads, K key heads, S slots, D head width, P pages, N pages of an update.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.model.page_choice import PAGE, KeySelection, PageChoice, Read, page_count, take_slots
from cda_cli.model.rules import AttentionRule


class KeyReads(NamedTuple):
    """What was read: the mean number of keys that a head reads for a token, of how many, and the most left out.

    `mass_left_out` is a share of a row's weight, of which no row has left out more (see `page_choice`).
    """

    keys_read: float
    keys: float
    mass_left_out: float


class KeyPages:
    """The largest and the smallest number of each channel in each page of a cache [L, B, K, S, D].

    `selection` says which pages a query reads.
    """

    def __init__(self, selection: KeySelection, keys_LBKSD: Tensor) -> None:
        L, B, K, S, D = keys_LBKSD.shape
        self.selection = selection
        self._dtype, device = torch.promote_types(keys_LBKSD.dtype, torch.float32), keys_LBKSD.device
        self._limits = torch.zeros(L, B, K, page_count(S), 2 * D, dtype=self._dtype, device=device)
        self._reads_all = False
        self._counted = torch.full((), B, device=device)  # rows
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # keys that were read, all keys, rows
        self._largest = torch.zeros((), dtype=self._dtype, device=device)

    @property
    def fits_cuda_graph(self) -> bool:
        """Whether the number of pages follows from the selection alone."""
        return self.selection.max_keys is not None

    def begin_prefill(self) -> None:
        """Says that prompts are read, with all keys: also the last of a prompt, if it is alone."""
        self._reads_all = True

    def begin_step(self, rows: int) -> None:
        """Says that a text goes on in the first `rows` rows, of which `reads` tells; the others have no request."""
        self._reads_all = False
        self._counted.fill_(rows)

    def reads(self) -> KeyReads:
        """Returns what was read so far. It waits for the device."""
        read, keys, rows = self._sums.tolist()
        return KeyReads(read / max(rows, 1), keys / max(rows, 1), self._largest.item())

    def move_row(self, source: int, target: int) -> None:
        """Copies a row into another one."""
        self._limits[:, target] = self._limits[:, source]

    def update(self, layer: int, rows: slice | Tensor, key_BKSD: Tensor, first: int, stop: int) -> None:
        """Takes in the keys that `rows` have in the slots from `first` to `stop`, and no others behind them."""
        pages = torch.arange(first // PAGE, page_count(stop), device=key_BKSD.device)
        self._update(layer, rows, key_BKSD, pages.expand(len(key_BKSD), -1), pages.new_full((1,), stop - 1))

    def _update(self, layer: int, rows: slice | Tensor, key_BKSD: Tensor, pages_BN: Tensor, newest_B: Tensor) -> None:
        """Looks at all keys of these pages up to the newest: an earlier text, which lies behind it, has no effect."""
        slots = pages_BN.unsqueeze(-1) * PAGE + torch.arange(PAGE, device=pages_BN.device)
        slots = slots.minimum(newest_B.view(-1, 1, 1)).flatten(1)  # The newest key stands for those behind it.
        keys = take_slots(key_BKSD, slots.unsqueeze(1)).unflatten(2, (-1, PAGE))
        smallest, largest = torch.aminmax(keys, dim=3)
        places = torch.arange(self._limits.shape[1], device=pages_BN.device)[rows].unsqueeze(1)
        limits_BKNE = torch.cat((largest, smallest), -1).to(self._dtype)
        self._limits[layer][places, :, pages_BN] = limits_BKNE.transpose(1, 2)

    def decode(
        self,
        layer: int,
        rows: slice | Tensor,
        rule: AttentionRule,
        query_BHTD: Tensor,
        key_BKSD: Tensor,
        value_BKSD: Tensor,
        budget: float | Tensor,
        visible_B: Tensor | None,
    ) -> Tensor:
        """Computes `rule.decode` for `rows` as if there were only the keys of the pages that are selected.

        Where these are all pages, it calls `rule.decode`.
        """
        if self._reads_all:
            return rule.decode(query_BHTD, key_BKSD, value_BKSD, budget, visible_B)
        read = self.choose(layer, rows, rule, query_BHTD, key_BKSD, budget, visible_B)
        if read is None:
            return rule.decode(query_BHTD, key_BKSD, value_BKSD, budget, visible_B)
        values = take_slots(value_BKSD, read.slots).to(self._dtype)
        with torch.autocast(values.device.type, enabled=False):
            return (read.weights @ values).to(value_BKSD.dtype).view(query_BHTD.shape)

    def choose(
        self,
        layer: int,
        rows: slice | Tensor,
        rule: AttentionRule,
        query_BHTD: Tensor,
        key_BKSD: Tensor,
        budget: float | Tensor,
        visible_B: Tensor | None,
    ) -> Read | None:
        """Takes in the newest key of each row, chooses what `decode` reads, with its weights, and counts it.

        None: all keys.
        """
        (B, H), (K, S), device = query_BHTD.shape[:2], key_BKSD.shape[1:3], query_BHTD.device
        keys_B = torch.full((B,), S, device=device) if visible_B is None else visible_B
        self._update(layer, rows, key_BKSD, (page_count(keys_B) - 1).unsqueeze(1), keys_B - 1)
        of_each = budget if isinstance(budget, Tensor) else torch.full((), budget, device=device)
        with torch.autocast(device.type, enabled=False):
            query = (rule.scale * query_BHTD.to(self._dtype)).view(B, K, H // K, -1)
            of_group = of_each.to(self._dtype).expand(B, H, 1).reshape(B, K, -1)
            limits = self._limits[layer, rows, :, : page_count(S)]
            read = PageChoice(rule, query, key_BKSD, keys_B, of_group, limits).read(self.selection)
        self._count(keys_B, read)
        return read

    def _count(self, keys_B: Tensor, read: Read | None) -> None:
        is_counted = torch.arange(len(keys_B), device=keys_B.device) < self._counted
        read_B = keys_B if read is None else read.seen.sum(-1, dtype=torch.float64).mean(-1)
        sums = torch.stack((read_B.double(), keys_B.double(), torch.ones_like(keys_B, dtype=torch.float64)))
        self._sums += (sums * is_counted).sum(1)
        if read is not None:
            torch.maximum(self._largest, (read.mass_left_out.amax(-1) * is_counted).amax(), out=self._largest)
