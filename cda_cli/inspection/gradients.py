"""Gradients of the loss by the budget of the rows and by factors on the heads, from one backward for each batch.

They say to first order what a head is worth, and what a larger budget would be.

Shapes: L layers, H heads, B batch, T tokens, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.data import Batch
from cda_cli.inspection.measures import GRADIENTS
from cda_cli.model import Transformer, editing
from cda_cli.token_losses import token_losses


class Gradients(NamedTuple):
    """`budget` is Σ k·∂L/∂k over all rows of a window, nats, [W]: how its loss L grows with ln k, to first order.

    `heads` is the mean over the windows of |∂L/∂ξ|, nats, [L, H], for a factor ξ on the output of a head (Michel et
    al., Are Sixteen Heads Really Better than One?, 1905.10650, equation 3). `head_budgets` is the mean over the windows
    of Σ ∂L/∂k over the rows of a head, nats for each key of k, [L, H].
    """

    budget: Tensor
    heads: Tensor
    head_budgets: Tensor

    def measures(self, has_budget: bool) -> dict[str, Tensor]:
        """Those of each head, [L, H], by the names of a report; NaN for that of a budget where there is none."""
        of_budget = self.head_budgets if has_budget else torch.full_like(self.head_budgets, torch.nan)
        return dict(zip(GRADIENTS, (self.heads.cpu(), of_budget.cpu()), strict=True))


def gradients(
    model: Transformer,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda windows: None,
) -> Gradients:
    """Computes them in evaluation mode, by the code with which the model trains, and restores the mode of the model."""
    L, H = model.config.depth, model.config.heads
    budget, (heads, head_budgets) = [], torch.zeros(2, L, H, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    try:
        for batch in batches:
            B = len(batch.inputs)
            log_k = torch.zeros(B, device=device, requires_grad=True)
            xi = torch.ones(L, B, 1, H, 1, device=device, requires_grad=True)
            more_k = torch.zeros(L, B, H, 1, device=device, requires_grad=True)
            with torch.enable_grad(), _changed(model, log_k, more_k, xi):
                loss = token_losses(model, batch, device, dtype).sum()
                # Under a rule without a budget the loss does not depend on k.
                by_k, by_more_k, by_head = torch.autograd.grad(
                    loss, (log_k, more_k, xi), allow_unused=True, materialize_grads=True
                )
            budget.append(by_k.double().cpu())
            heads += by_head.double().abs().sum(1)[:, 0, :, 0]
            head_budgets += by_more_k.double().sum((1, 3))
            advance(B)
    finally:
        model.train(training)
    total = torch.cat(budget)
    return Gradients(total, heads / len(total), head_budgets / len(total))


def _changed(model: Transformer, log_k_B: Tensor, more_k: Tensor, xi: Tensor) -> AbstractContextManager[None]:
    """Multiplies the k of all rows of a window by exp(log_k) and adds `more_k`; multiplies the output of heads by ξ."""
    return editing(
        model,
        budget=lambda layer, k_BHT: k_BHT * log_k_B.exp()[:, None, None] + more_k[layer],
        heads=lambda layer, out_BTHD: out_BTHD * xi[layer].to(out_BTHD.dtype),
    )
