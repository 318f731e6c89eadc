"""The keys and values of the positions that a model has read, for generation.

Shapes: L layers, B rows of a batch, K key heads, T new positions, S slots (null keys first), D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cda_cli.model.key_pages import KeyPages
from cda_cli.model.page_choice import KeySelection
from cda_cli.model.rules import AttentionRule
from cda_cli.model.shards import full_tensor

if TYPE_CHECKING:
    from cda_cli.model.rotary import RotaryPositions, RotaryTables
    from cda_cli.model.transformer import Transformer


class KeyValueCache(ABC):
    """What the layers see of a cache in one forward pass: they store new positions and read all of a row."""

    length: int | Tensor  # The positions before the new ones: one number for all rows, or int64 [B].
    visible_B: Tensor | None = None  # The number of keys that each row sees, int64 [B], if not all of `append`.
    holds_null_keys = False  # Otherwise each attention layer puts its own in front.
    rows: slice | Tensor  # The places of the rows in the whole cache.
    pages: KeyPages | None = None  # What chooses the keys that a query reads, if that is not all.

    @abstractmethod
    def append(self, layer: int, key_BKTD: Tensor, value_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new positions of a layer. Returns the keys and the values of that layer, [B, K, S, D] each."""

    def decode(
        self,
        layer: int,
        rule: AttentionRule,
        query_BHTD: Tensor,
        key_BKSD: Tensor,
        value_BKSD: Tensor,
        budget: float | Tensor,
    ) -> Tensor:
        """Computes attention [B, H, 1, D] of one query of each row to what `append` returned."""
        if self.pages is not None:
            inputs = (query_BHTD, key_BKSD, value_BKSD, budget, self.visible_B)
            return self.pages.decode(layer, self.rows, rule, *inputs)
        return rule.decode(query_BHTD, key_BKSD, value_BKSD, budget, self.visible_B)

    def advance(self, positions: int) -> None:
        """Counts the positions that every layer has stored."""
        self.length += positions


class StaticCache:
    """The keys and values of B rows for every layer: [L, B, K, null keys + positions, D] each, allocated once.

    The null keys of each layer stand in the first slots, and the position p of a row in slot null keys + p. Rows thus
    need no padding in front, whatever their lengths: `lengths_B`, int64, positions of each row on the device. There is
    room for `positions` of each row, or for the model's whole context. A query of a single position reads the keys of
    `selection`, if that is given and does not hold all slots.
    """

    def __init__(
        self,
        model: Transformer,
        batch_size: int,
        dtype: torch.dtype,
        positions: int | None = None,
        selection: KeySelection | None = None,
    ) -> None:
        config, device = model.config, model.token_embedding.weight.device
        self.null_keys = config.null_kv
        slots = config.null_kv + (config.seq_len if positions is None else positions)
        shape = (config.depth, batch_size, config.key_heads, slots, config.head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths_B = torch.zeros(batch_size, device=device, dtype=torch.int64)
        for layer, block in enumerate(model.each_block()):
            null_key, null_value = block.attention.null_heads(_whole(block.attention.null_kv))
            self.keys[layer, :, :, : self.null_keys] = null_key
            self.values[layer, :, :, : self.null_keys] = null_value
        self.pages = None if selection is None or selection.holds(slots) else KeyPages(selection, self.keys)

    def rows(self, rows: slice | Tensor = slice(None), length: int = 0) -> CachedRows:
        """Returns the cache of some rows (a slice or their indices), each of which has `length` positions so far."""
        return CachedRows(self, rows, length)

    def step(self, rows: int, longest: int) -> CachedStep:
        """Returns the cache of the first `rows` rows for a pass of one token each, whose position is `lengths_B`.

        No row has more than `longest` positions with the new one. A CUDA graph may hold what it computes: the lengths
        are read on the device.
        """
        return CachedStep(self, rows, longest)

    def move_row(self, source: int, target: int) -> None:
        """Copies a row into another one."""
        for tensor, dim in ((self.keys, 1), (self.values, 1), (self.lengths_B, 0)):
            tensor.select(dim, target).copy_(tensor.select(dim, source))
        if self.pages is not None:
            self.pages.move_row(source, target)


def _whole(parameter: Tensor) -> Tensor:
    """All of a parameter, without its gradient. All processes call this together."""
    with torch.inference_mode(False):  # In that mode PyTorch 2.11 gathers no shard.
        return full_tensor(parameter.detach())


class CachedRows(KeyValueCache):
    """Rows that have equally many positions, and get equally many new ones. `lengths_B` is left to the caller."""

    holds_null_keys = True
    length: int

    def __init__(self, cache: StaticCache, rows: slice | Tensor, length: int) -> None:
        self.cache, self.rows, self.length, self.pages = cache, rows, length, cache.pages

    def append(self, layer: int, key_BKTD: Tensor, value_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        first = self.cache.null_keys + self.length
        stop = first + key_BKTD.shape[2]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys[self.rows, :, first:stop] = key_BKTD.to(keys.dtype)
        values[self.rows, :, first:stop] = value_BKTD.to(values.dtype)
        stored = keys[self.rows, :, :stop]
        if self.pages is not None:
            self.pages.update(layer, self.rows, stored, first, stop)
        return stored, values[self.rows, :, :stop]


class CachedStep(KeyValueCache):
    """Rows of unequal length that get one position each. `advance` moves `lengths_B` on."""

    holds_null_keys = True
    length: Tensor

    def __init__(self, cache: StaticCache, rows: int, longest: int) -> None:
        self.cache, self.slots = cache, cache.null_keys + longest
        # A row that has no request may be longer than the others, and goes on with them.
        self.length = cache.lengths_B[:rows].clamp_(max=longest - 1)
        self.visible_B: Tensor = self.length + (cache.null_keys + 1)
        self._places: tuple[Tensor, Tensor] | None = None  # rows and slots of the new positions
        self.rows, self.pages = slice(0, rows), cache.pages
        self._tables: RotaryTables | None = None

    def append(self, layer: int, key_BKTD: Tensor, value_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.layer(layer)
        if self._places is None:
            self._places = torch.arange(len(keys), device=keys.device), self.visible_B - 1
        rows_B, slot_B = self._places
        keys[rows_B, :, slot_B] = key_BKTD.squeeze(2).to(keys.dtype)
        values[rows_B, :, slot_B] = value_BKTD.squeeze(2).to(values.dtype)
        return keys, values

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns the keys and the values of a layer, [B, K, S, D] each, in which the new position is to be stored."""
        rows = len(self.length)
        return self.cache.keys[layer, :rows, :, : self.slots], self.cache.values[layer, :rows, :, : self.slots]

    def rotary_tables(self, rotary: RotaryPositions) -> RotaryTables:
        """Returns the tables of the new positions, [B, 1, D], which all layers have in common."""
        if self._tables is None:
            self._tables = rotary.at(self.length, 1)
        return self._tables

    def advance(self, positions: int) -> None:
        self.length.add_(positions)
