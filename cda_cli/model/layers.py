"""Small layers (normalisation, rotary positions), and the settings of the solver.

Shapes: B batch, H heads, T positions, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cda_cli.config import ModelConfig
from cda_cli.ops import SolverSettings

EPS = 1e-6  # added to the mean square in the norms


def make_norm(config: ModelConfig) -> nn.Module:
    return nn.LayerNorm(config.dim) if config.norm == "layernorm" else RMSNorm(config.dim)


def solver_settings(config: ModelConfig) -> SolverSettings:
    return SolverSettings(
        solver=config.solver, n_iters=config.n_iters, eps_init=config.eps_init, eps_decay=config.eps_decay
    )


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with a learned gain, in the dtype of its input; its statistics are float32.

    Under autocast the gain is cast to the dtype of the input: PyTorch's fused kernel takes one dtype only.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), EPS)


class HeadNorm(RMSNorm):
    """RMSNorm of each head [B, T, H, D], with one gain [D] for all of them."""

    def forward(self, x_BTHD: Tensor) -> Tensor:
        # Each head gets a copy of the gain: the compiler then sums the gradient over B·T rows of H·D numbers, which is
        # faster than over B·T·H rows of D.
        gain_HD = self.weight.expand(x_BTHD.shape[-2], -1).contiguous()
        return (F.rms_norm(x_BTHD, self.normalized_shape, None, EPS) * gain_HD).to(x_BTHD.dtype)


class RotaryPositions(nn.Module):
    """Rotates pairs of a head's channels by position · base^(−2i/D) (RoFormer, arXiv 2104.09864, equation 34)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, seq_len: int, base: float) -> None:
        super().__init__()
        frequency = base ** (-torch.arange(0, head_width, 2).double() / head_width)
        angle = torch.outer(torch.arange(seq_len).double(), frequency)
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), 1).float(), persistent=False)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), 1).float(), persistent=False)

    def forward(self, x_BTHD: Tensor, start: int) -> Tensor:
        """Rotates x [B, T, H, D], whose first position is `start`. Channels i and i + D/2 make a pair."""
        positions = slice(start, start + x_BTHD.shape[1])
        cos, sin = (table[positions, None].to(x_BTHD.dtype) for table in (self.cos, self.sin))
        # The table has the sign, so this only reads x once more. A concatenation would compile to masked reads or to
        # another tensor.
        partner = x_BTHD.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        return x_BTHD * cos + partner * sin
