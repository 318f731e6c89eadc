"""Gradients of the loss by the budget of the rows and by factors on the heads, from one backward for each batch.

Shapes: L layers, H heads, B batch, T tokens, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.data import Batch
from cda_cli.model import Transformer, editing
from cda_cli.token_losses import token_losses


class Gradients(NamedTuple):
    """`budget` is Σ k·∂L/∂k over all rows of a window, nats, [W]: how its loss L grows with ln k, to first order.

    `heads` is the mean over the windows of |∂L/∂ξ|, nats, [L, H], for a factor ξ on the output of a head.
    """

    budget: Tensor
    heads: Tensor


def gradients(
    model: Transformer,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda windows: None,
) -> Gradients:
    """Computes them in evaluation mode, by the code with which the model trains, and restores the mode of the model."""
    L, H = model.config.depth, model.config.heads
    budget, heads = [], torch.zeros(L, H, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            B = len(batch.inputs)
            log_k = torch.zeros(B, device=device, requires_grad=True)
            xi = torch.ones(L, B, 1, H, 1, device=device, requires_grad=True)
            with torch.enable_grad(), _scaled(model, log_k, xi):
                loss = token_losses(model, batch, device, dtype).sum()
                # Under a rule without a budget the loss does not depend on k.
                by_k, by_head = torch.autograd.grad(loss, (log_k, xi), allow_unused=True, materialize_grads=True)
            budget.append(by_k.double().cpu())
            heads += by_head.double().abs().sum(1)[:, 0, :, 0]
            advance(B)
    finally:
        model.train(training)
    total = torch.cat(budget)
    return Gradients(total, heads / len(total))


def _scaled(model: Transformer, log_k_B: Tensor, xi: Tensor) -> AbstractContextManager[None]:
    """Multiplies the k of all rows of a window by exp(log_k), and the output of each head by ξ."""
    return editing(
        model,
        budget=lambda layer, k_BHT: k_BHT * log_k_B.exp()[:, None, None],
        heads=lambda layer, out_BTHD: out_BTHD * xi[layer].to(out_BTHD.dtype),
    )
