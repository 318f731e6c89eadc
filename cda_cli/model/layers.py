"""The norms, dropout, a linear for numbers of heads, and the settings of the solver.

Shapes: B batch, H heads, T positions, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cda_cli.config import ModelConfig
from cda_cli.ops import WIDEST_STREAM, Backend, SolverSettings, add_and_norm, can_run_kernels

LAYERNORM_EPS, RMSNORM_EPS = 1e-5, 1e-6  # added to the variance, and to the mean square


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.dim, config.norm_eps or LAYERNORM_EPS)
    return RMSNorm(config.dim, config.norm_eps or RMSNORM_EPS)


def add_then_norm(x: Tensor, branch: Tensor | None, norm: nn.Module, backend: Backend) -> tuple[Tensor, Tensor]:
    """Returns x + branch, and its norm by a layer of `make_norm`: without a gradient by one kernel, where there is one.

    The kernel rounds the norm to the dtype of autocast, which a linear would do.
    """
    assert isinstance(norm, (nn.LayerNorm, RMSNorm))
    fits = x.shape[-1] <= WIDEST_STREAM and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not fits or not can_run_kernels(backend, x.device, x.dtype, 0):
        total = x if branch is None else x + branch
        return total, norm(total)
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    bias = norm.bias if isinstance(norm, nn.LayerNorm) else None
    return add_and_norm(x, branch, norm.weight, bias, norm.eps, isinstance(norm, nn.LayerNorm), dtype)


def make_dropout(config: ModelConfig) -> nn.Module:
    return nn.Dropout(config.dropout) if config.dropout else nn.Identity()


def make_head_norm(config: ModelConfig) -> HeadNorm | None:
    """Makes the norm of queries or of keys, where the model has one."""
    return HeadNorm(config.head_width, config.norm_eps or RMSNORM_EPS) if config.qk_norm else None


def head_linear(dim: int, heads: int, bias: float) -> nn.Linear:
    """Makes a linear with one output for each of some heads, whose bias starts at `bias`."""
    linear = nn.Linear(dim, heads)
    nn.init.constant_(linear.bias, bias)
    return linear


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
        return self.with_gains(x_BTHD, self.weight.expand(x_BTHD.shape[-2], -1).contiguous())

    def together(self, other: HeadNorm, x_BTHD: Tensor, heads: int) -> Tensor:
        """Norms the first `heads` by this norm, and the others by `other`, in half as many calls."""
        gains = self.weight.expand(heads, -1), other.weight.expand(x_BTHD.shape[-2] - heads, -1)
        return self.with_gains(x_BTHD, torch.cat(gains))

    def with_gains(self, x_BTHD: Tensor, gain_HD: Tensor) -> Tensor:
        return (F.rms_norm(x_BTHD, self.normalized_shape, None, self.eps) * gain_HD).to(x_BTHD.dtype)
