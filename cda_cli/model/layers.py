"""The norms, dropout, and the settings of the solver.

Shapes: B batch, H heads, T positions, D head width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cda_cli.config import ModelConfig
from cda_cli.ops import SolverSettings

LAYERNORM_EPS, RMSNORM_EPS = 1e-5, 1e-6  # added to the variance, and to the mean square


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.dim, config.norm_eps or LAYERNORM_EPS)
    return RMSNorm(config.dim, config.norm_eps or RMSNORM_EPS)


def make_dropout(config: ModelConfig) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


def make_head_norm(config: ModelConfig) -> HeadNorm | None:
    """Makes the norm of queries or of keys, where the model has one."""
    return HeadNorm(config.head_width, config.norm_eps or RMSNORM_EPS) if config.qk_norm else None


def solver_settings(config: ModelConfig) -> SolverSettings:
    return SolverSettings(
        solver=config.solver, n_iters=config.n_iters, eps_init=config.eps_init, eps_decay=config.eps_decay
    )


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with a learned gain, in the dtype of its input; its statistics are float32.

    Under autocast the gain is cast to the dtype of the input: PyTorch's fused kernel takes one dtype only.
    """

    eps: float

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm of each head [B, T, H, D], with one gain [D] for all of them."""

    def forward(self, x_BTHD: Tensor) -> Tensor:
        # Each head gets a copy of the gain: the compiler then sums the gradient over B·T rows of H·D numbers, which is
        # faster than over B·T·H rows of D.
        gain_HD = self.weight.expand(x_BTHD.shape[-2], -1).contiguous()
        return (F.rms_norm(x_BTHD, self.normalized_shape, None, self.eps) * gain_HD).to(x_BTHD.dtype)
