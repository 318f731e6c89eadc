"""The cross-entropy over a vocabulary, from the residual stream on.

The compiler makes one loop of the sum over a long row, with two exponentials a logit, which take longer than reading
the logits. If the row is cut into parts that stay in registers, one exponential is enough. A vocabulary without such
parts, such as GPT-2's 50257 tokens, is padded to a multiple of 64 that has them. Only compiled code pads, and only
inside the loss: the weights, a checkpoint and the logits that are sampled from have the width of the vocabulary.

Shapes: B batch, T positions, N = B·T, C width of the residual stream, V vocabulary, P the padded vocabulary.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cda_cli.targets import IGNORE

PARTS = range(1024, 127, -1)  # numbers of logits that fit in the registers of a compiled kernel, largest first
MULTIPLE = 64
PIECE = 2**26  # logits that an evaluation has at a time: 256 MiB in float32


def padded_vocabulary(V: int) -> int:
    """Returns the number of logits that compiled code takes the loss of: V, or the next multiple of 64 that has parts.

    A multiple of 64 stays, and so does a vocabulary that fits in registers whole.
    """
    if V % MULTIPLE == 0 or PARTS[0] >= V:
        return V
    return next(P for P in count(V + -V % MULTIPLE, MULTIPLE) if _part(P) < P)


def positions_of_a_piece(B: int, V: int) -> int:
    """Returns how many positions of B sequences have at most PIECE logits, and 1 at least."""
    return max(1, PIECE // (B * V))


def vocabulary_loss(x_BTC: Tensor, to_logits: nn.Linear, targets_BT: Tensor) -> Tensor:
    """Returns −log softmax of each target among `to_logits(x)`, nats, float32 [B, T]; 0 if a target is IGNORE.

    Without gradients and a compiler, it takes the positions piece by piece, so that memory does not grow with T × V.
    """
    V = to_logits.out_features
    most = positions_of_a_piece(len(x_BTC), V)
    if x_BTC.shape[1] > most and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        pieces = zip(x_BTC.split(most, 1), targets_BT.split(most, 1), strict=True)
        return torch.cat([vocabulary_loss(x, to_logits, targets) for x, targets in pieces], 1)
    padding = padded_vocabulary(V) - V
    if padding and torch.compiler.is_compiling():
        # The compiler makes the zeros in the kernel that casts the weights.
        weight = F.pad(to_logits.weight, (0, 0, 0, padding))
        bias = F.pad(to_logits.bias, (0, padding)) if to_logits.bias is not None else None
        logits_BTP = F.linear(x_BTC, weight, bias)
    else:
        logits_BTP = to_logits(x_BTC)
    return cross_entropy(logits_BTP.flatten(0, 1), targets_BT.flatten(), V).view_as(targets_BT)


def cross_entropy(logits_NP: Tensor, targets_N: Tensor, V: int) -> Tensor:
    """Returns −log softmax of each target among the first V logits, nats, float32 [N]; 0 if a target is IGNORE."""
    P = logits_NP.shape[-1]
    if torch.compiler.is_compiling() and _part(P) < P:
        return _CrossEntropyInParts.apply(logits_NP, targets_N, _part(P), V)  # type: ignore[no-untyped-call]
    return F.cross_entropy(logits_NP.float(), targets_N, reduction="none")


def _part(P: int) -> int:
    """Returns the largest of PARTS that divides P, or P if none does."""
    return next((part for part in PARTS if P % part == 0), P)


class _CrossEntropyInParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NP: Tensor, targets_N: Tensor, part: int, V: int) -> Tensor:
        sums = _masked(logits_NP, V).unflatten(-1, (-1, part)).logsumexp(-1).logsumexp(-1)
        ctx.save_for_backward(logits_NP, targets_N, sums)
        ctx.V = V
        of_targets = logits_NP.gather(-1, torch.where(targets_N == IGNORE, 0, targets_N).unsqueeze(-1)).squeeze(-1)
        return torch.where(targets_N == IGNORE, 0.0, sums - of_targets.float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NP, targets_N, sums = ctx.saved_tensors
        grad_N1 = torch.where(targets_N == IGNORE, 0.0, grads[0]).unsqueeze(-1)
        is_target = torch.arange(logits_NP.shape[-1], device=logits_NP.device) == targets_N.unsqueeze(-1)
        softmax = (_masked(logits_NP, ctx.V) - sums.unsqueeze(-1)).exp()
        return ((softmax - is_target.float()) * grad_N1).to(logits_NP.dtype), None, None, None


def _masked(logits_NP: Tensor, V: int) -> Tensor:
    """Returns the logits in float32, with −∞ for the padding, so that its softmax and gradient are 0."""
    logits_NP = logits_NP.float()
    if logits_NP.shape[-1] == V:
        return logits_NP
    return torch.where(torch.arange(logits_NP.shape[-1], device=logits_NP.device) < V, logits_NP, -torch.inf)
