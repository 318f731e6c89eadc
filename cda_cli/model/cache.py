"""The key-value cache of generation.

Shapes: B batch, K key heads, T positions, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cda_cli.config import ModelConfig


class KeyValueCache:
    """The keys and values of the positions so far, for every layer: [depth, B, K, seq_len, D] each, allocated once.

    It holds no null keys; each attention layer puts its own in front.
    """

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.depth, batch_size, config.key_heads, config.seq_len, config.head_width)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.capacity = config.seq_len

    def append(self, layer: int, key_BKTD: Tensor, value_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new positions of a layer and returns all keys and values of that layer, [B, K, length + T, D].

        `advance` moves `length` on, after the last layer.
        """
        stop = self.length + key_BKTD.shape[2]
        self.keys[layer, :, :, self.length : stop] = key_BKTD
        self.values[layer, :, :, self.length : stop] = value_BKTD
        return self.keys[layer, :, :, :stop], self.values[layer, :, :, :stop]

    def advance(self, positions: int) -> None:
        """Counts the positions that every layer has stored."""
        self.length += positions
