"""The cross-entropy over a vocabulary. Shapes: N tokens, V logits of each."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cda_cli.targets import IGNORE

PARTS = range(1024, 127, -1)  # numbers of logits that fit in the registers of a compiled kernel, largest first


def cross_entropy(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Returns −log softmax of each target, nats, float32 [N]; 0 if a target is IGNORE.

    The compiler makes one loop of the sum over a long row, with two exponentials a logit, which take longer than
    reading the logits. If the row is cut into parts that stay in registers, one exponential is enough.
    """
    V = logits_NV.shape[-1]
    part = next((part for part in PARTS if V % part == 0), V)
    if torch.compiler.is_compiling() and part < V:
        return _CrossEntropyInParts.apply(logits_NV, targets_N, part)  # type: ignore[no-untyped-call]
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


class _CrossEntropyInParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, part: int) -> Tensor:
        sums = logits_NV.unflatten(-1, (-1, part)).float().logsumexp(-1).logsumexp(-1)
        ctx.save_for_backward(logits_NV, targets_N, sums)
        of_targets = logits_NV.gather(-1, torch.where(targets_N == IGNORE, 0, targets_N).unsqueeze(-1)).squeeze(-1)
        return torch.where(targets_N == IGNORE, 0.0, sums - of_targets.float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N, sums = ctx.saved_tensors
        grad_N1 = torch.where(targets_N == IGNORE, 0.0, grads[0]).unsqueeze(-1)
        is_target = torch.arange(logits_NV.shape[-1], device=logits_NV.device) == targets_N.unsqueeze(-1)
        softmax = (logits_NV.float() - sums.unsqueeze(-1)).exp()
        return ((softmax - is_target.float()) * grad_N1).to(logits_NV.dtype), None, None
