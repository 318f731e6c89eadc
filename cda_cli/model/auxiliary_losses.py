"""Auxiliary losses: terms of a training loss that layers make of what they have in hand, beside the loss of the tokens.

A term rides on a tensor of its layer: the forward returns that tensor as it is, and the backward adds the gradient of
the term. So no term has to find its way out of compiled code, recomputed blocks and wrappers. Each has a weight, a leaf
of autograd, and is weight × value: the gradient of the weight is therefore the value, summed over layers and batches.

Source: MoEAuxLossAutoScaler of Megatron-LM, and AddAuxiliaryLoss of DeepSeek-MoE.

Shapes: B batch, H heads, K key heads, T queries, S keys, D head width, F units of the feed-forward, r of the T queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cda_cli.model.rules import AttentionRule

SAMPLED_ROWS = 32  # about so many queries of each sequence and head are measured, evenly spread


class _Riding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], torch.ones((), dtype=torch.float32, device=grads[0].device)


def with_auxiliary_loss(x: Tensor, loss: Tensor) -> Tensor:
    """Returns `x`. Its backward also takes the gradient of `loss`, a scalar in float32, as a term of the whole loss."""
    riding: Tensor = _Riding.apply(x, loss)  # type: ignore[no-untyped-call]
    return riding


class ActivationL1:
    """The L1 norm of the activations of a token, Σ|h| over the units of a layer, times `weight`.

    It is the mean over `parts`, the layers of all batches of a step, and over the tokens of each.
    """

    def __init__(self, weight: Tensor, parts: int) -> None:
        self.weight, self.parts = weight, parts

    def __call__(self, units_BTF: Tensor) -> Tensor:
        norm = units_BTF.abs().sum(-1, dtype=torch.float32).mean()
        return with_auxiliary_loss(units_BTF, self.weight * (norm / self.parts))


class ExcessSupport:
    """How far the effective support of attention is above `target` keys, as a share of it, times `weight`.

    It is the mean over `parts`, the layers of all batches of a step, over their heads and over rows that lie evenly. It
    is negative where the support is below the target.
    """

    def __init__(self, weight: Tensor, target: float, parts: int) -> None:
        self.weight, self.target, self.parts = weight, target, parts

    def __call__(
        self, rule: AttentionRule, query_BHTD: Tensor, key_BKSD: Tensor, budget: float | Tensor, processes: int = 1
    ) -> Tensor:
        """Returns the query. The budget is that of `AttentionRule.attend`.

        Of `processes` that share a sequence, each calls it for its two chunks. The mean over them is that of all rows.
        """
        B, H, T = query_BHTD.shape[:3]
        whole = T if processes == 1 else 2 * processes * T
        first = key_BKSD.shape[2] - rule.config.null_kv - T
        apart = max(1, whole // SAMPLED_ROWS)
        weights = rule.weights_of(query_BHTD, key_BKSD, budget, slice((apart // 2 - first) % apart, None, apart))
        rows = B * H * len(range(apart // 2, whole, apart)) / processes
        excess = (effective_support(weights) / self.target - 1).sum() / rows
        return with_auxiliary_loss(query_BHTD, self.weight * (excess / self.parts))


def effective_support(weights_BHrS: Tensor) -> Tensor:
    """Returns exp(entropy) of each row divided by its sum, [B, H, r]: how many keys share it."""
    share = weights_BHrS / weights_BHrS.sum(-1, keepdim=True)
    # A weight of 0 adds nothing. The smallest number keeps its logarithm, and so its gradient, finite.
    return (-share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum(-1).exp()
