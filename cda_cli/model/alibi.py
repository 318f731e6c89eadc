"""ALiBi in half of the heads (`model.position` nape): a score falls by the head's slope for each token of distance.

Shapes: B batch, H heads, K key heads, T positions, N null keys, D head width, P channels of a position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cda_cli.config import POSITION_CHANNELS, ModelConfig
from cda_cli.model.left_padding import Start, row_positions

PART = 256  # bf16 holds the whole numbers up to this one, so two of them hold positions up to its square.


class AlibiPositions(nn.Module):
    """Adds −slope·(i − j) to the score of query i and key j in the first half of the heads, and nothing to the others.

    The slopes are 1, 1/2, 1/3, …, rounded to bf16 (by 0.4 % at most). A null key is at distance 0 from every query.
    Sources: ALiBi (arXiv 2108.12409), and ASEntmax (arXiv 2506.16640) for the slopes and for half of the heads.

    The bias is a part of the product of query and key, so that rules, kernels and caches need not know of it: the last
    channels of such a head, which are no longer projected, hold

        query i:  256·slope   slope      −slope·i, in two parts
        key j:    ⌊j/256⌋     j mod 256  1    1

    with slopes in units of the scale of the scores. bf16 holds the first two exactly, so that the bias is as even
    in the distance as float32 sums are. The two parts of −slope·i have 16 bits in bf16; what they leave is the same
    for all keys of a row, other than null keys.
    """

    query_channels: Tensor
    key_channels: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        for name, heads in (("query_channels", config.heads // 2), ("key_channels", 1)):
            empty = torch.empty(config.seq_len, heads, POSITION_CHANNELS, dtype=torch.float32)
            self.register_buffer(name, empty, persistent=False)
        self.fill_buffers()

    @torch.no_grad()
    def fill_buffers(self) -> None:
        """Computes the tables, which no checkpoint holds. Those of a model without values have none."""
        if self.key_channels.is_meta:
            return
        position = torch.arange(self.config.seq_len).double()
        part = (position / PART).floor()
        one = torch.ones_like(position)
        self.key_channels.copy_(torch.stack((part, position - PART * part, one, one), -1).unsqueeze(1))
        slope = self.config.head_width**0.5 / torch.arange(1, self.config.heads // 2 + 1).double()
        slope = slope.bfloat16().double().expand(len(position), -1)
        ahead = -slope * position.unsqueeze(1)
        rounded = ahead.bfloat16().double()
        self.query_channels.copy_(torch.stack((PART * slope, slope, rounded, ahead - rounded), -1))

    def forward(
        self, query_BTHD: Tensor, key_BTKD: Tensor, start: Start, padding_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Returns query and key with the channels of their `row_positions`."""
        positions = row_positions(start, query_BTHD.shape[1], padding_B)
        query = _with_channels(query_BTHD, self.query_channels[positions])
        return query, _with_channels(key_BTKD, self.key_channels[positions])

    def null_keys(self, null_KND: Tensor) -> Tensor:
        """Returns null keys that have no position, so that their scores get no bias."""
        half = len(null_KND) // 2
        without = F.pad(null_KND[:half, :, :-POSITION_CHANNELS], (0, POSITION_CHANNELS))
        return torch.cat((without, null_KND[half:]))


def _with_channels(heads_BTHD: Tensor, channels: Tensor) -> Tensor:
    """Puts channels [B or none, T, H/2 or 1, P] into the first half of the heads."""
    half = heads_BTHD.shape[2] // 2
    content = heads_BTHD[:, :, :half, :-POSITION_CHANNELS]
    channels = channels.to(heads_BTHD.dtype).expand(*content.shape[:3], -1)
    return torch.cat((torch.cat((content, channels), -1), heads_BTHD[:, :, half:]), 2)
