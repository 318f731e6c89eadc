"""Rotary positions, and the scalings by which those of a short context serve a longer one (`model.rotary_scaling`).

Shapes: B batch, H heads, T positions, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cda_cli.config import ModelConfig
from cda_cli.model.left_padding import Start, row_positions


class RotaryTables(NamedTuple):
    """cos and sin of some positions; the second half of the channels has the sign."""

    cos: Tensor
    sin: Tensor


class RotaryPositions(nn.Module):
    """Rotates pairs of a head's channels by position · base^(−2i/D) (RoFormer, arXiv 2104.09864, equation 34).

    A scaling changes these frequencies, and may lengthen the rotated heads by a factor.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        for table in ("cos", "sin"):
            empty = torch.empty(config.seq_len, config.head_width, dtype=torch.float32)
            self.register_buffer(table, empty, persistent=False)
        self.fill_buffers()

    @torch.no_grad()
    def fill_buffers(self) -> None:
        """Computes the tables, which no checkpoint holds. Those of a model without values have none."""
        if self.cos.is_meta:
            return
        D = self.config.head_width
        frequency = self.config.rotary_base ** (-torch.arange(0, D, 2).double() / D)
        frequency, factor = SCALINGS[self.config.rotary_scaling](frequency, self.config)
        angle = torch.outer(torch.arange(self.config.seq_len).double(), frequency)
        cos, sin = factor * angle.cos(), factor * angle.sin()
        self.cos.copy_(torch.cat((cos, cos), 1))
        self.sin.copy_(torch.cat((-sin, sin), 1))

    def at(self, start: Start, T: int, padding_B: Tensor | None = None) -> RotaryTables:
        """Returns the tables at `row_positions`: [T, D], or [B, T, D]."""
        positions = row_positions(start, T, padding_B)
        return RotaryTables(self.cos[positions], self.sin[positions])

    def forward(self, x_BTHD: Tensor, start: Start, padding_B: Tensor | None = None) -> Tensor:
        """Rotates x [B, T, H, D] at its `row_positions`."""
        return rotate(x_BTHD, self.at(start, x_BTHD.shape[1], padding_B))


def rotate(x_BTHD: Tensor, tables: RotaryTables) -> Tensor:
    """Rotates x [B, T, H, D] to the positions of `tables`. Channels i and i + D/2 make a pair."""
    cos, sin = (table.unsqueeze(-2).to(x_BTHD.dtype) for table in tables)
    # The table has the sign, so this only reads x once more. A concatenation would compile to masked reads or to
    # another tensor.
    partner = x_BTHD.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return x_BTHD * cos + partner * sin


def _unscaled(frequency: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    return frequency, 1.0


def _llama3(frequency: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """Divides by the factor what turns less than `rotary_low_freq_factor` times in the original context.

    What turns more than `rotary_high_freq_factor` times stays, and between them the share that stays grows evenly.
    Source: `apply_scaling` of Llama 3.1 (meta-llama/llama-models), and `_compute_llama3_parameters` of transformers.
    """
    low, high = config.rotary_low_freq_factor, config.rotary_high_freq_factor
    turns = config.rotary_trained_len * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / config.rotary_factor), 1.0


def _yarn(frequency: Tensor, config: ModelConfig) -> tuple[Tensor, float]:
    """Divides by the factor the pairs that turn less than `rotary_beta_slow` times in the original context.

    Those that turn more than `rotary_beta_fast` times stay, and between them the share that stays falls evenly with the
    index of the pair. Source: YaRN (arXiv 2309.00071, sections 3.2 and 3.4, whose √(1/t) is the factor), with the
    bounds rounded outwards, as in its code and in `_compute_yarn_parameters` of transformers.
    """
    D, length = config.head_width, config.rotary_trained_len

    def pair(turns: float) -> float:
        """The index of the pair that turns so often, as a fraction."""
        return D * math.log(length / (2 * math.pi * turns)) / (2 * math.log(config.rotary_base))

    first = max(math.floor(pair(config.rotary_beta_fast)), 0)
    last = min(math.ceil(pair(config.rotary_beta_slow)), D - 1)
    scaled = ((torch.arange(D // 2).double() - first) / (last - first or 0.001)).clamp(0, 1)
    factor = config.rotary_attention_factor or 0.1 * math.log(config.rotary_factor) + 1
    return frequency * (1 - scaled + scaled / config.rotary_factor), factor


SCALINGS: dict[str, Callable[[Tensor, ModelConfig], tuple[Tensor, float]]] = {
    "none": _unscaled,
    "llama3": _llama3,
    "yarn": _yarn,
}
