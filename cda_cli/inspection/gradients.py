"""Gradients of the loss by the budget of the rows and by factors on the heads, from one backward for each batch.

They say to first order what a head is worth, and what a larger budget would be.

Shapes: L layers, H heads, B batch, T tokens, C width of the residual stream, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from cda_cli.data import Batch
from cda_cli.inspection.measures import GRADIENTS
from cda_cli.model import Transformer, editing
from cda_cli.model.loss import positions_of_a_piece
from cda_cli.runtime import autocast, to_device

TOKENS = 2**15  # of the windows that are in one backward pass


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
    """Computes them in evaluation mode, by the code with which the model trains, and restores the mode of the model.

    Of the forward pass only the input of each block is kept, and few windows are taken at a time, so that long windows
    fit.
    """
    L, H = model.config.depth, model.config.heads
    budget, (heads, head_budgets) = [], torch.zeros(2, L, H, dtype=torch.float64, device=device)
    before = model.training, model.activation_checkpointing
    model.eval()
    model.activation_checkpointing = True
    try:
        for inputs, targets in _few_windows(batches):
            B = len(inputs)
            log_k = torch.zeros(B, device=device, requires_grad=True)
            xi = torch.ones(L, B, 1, H, 1, device=device, requires_grad=True)
            more_k = torch.zeros(L, B, H, 1, device=device, requires_grad=True)
            inputs, targets = (to_device(each, device) for each in (inputs, targets))
            with torch.enable_grad(), _changed(model, log_k, more_k, xi):
                with autocast(device, dtype):
                    x_BTC = model.stream(inputs)
                    by_x = _loss_by_stream(model, x_BTC.detach(), targets)
                # Under a rule without a budget the loss does not depend on k.
                by_k, by_more_k, by_head = torch.autograd.grad(
                    x_BTC, (log_k, more_k, xi), by_x, allow_unused=True, materialize_grads=True
                )
            budget.append(by_k.double().cpu())
            heads += by_head.double().abs().sum(1)[:, 0, :, 0]
            head_budgets += by_more_k.double().sum((1, 3))
            advance(B)
    finally:
        model.train(before[0])
        model.activation_checkpointing = before[1]
    total = torch.cat(budget)
    return Gradients(total, heads / len(total), head_budgets / len(total))


def _few_windows(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields inputs and targets of at most TOKENS tokens, but of one window at least."""
    for batch in batches:
        most = max(1, TOKENS // batch.inputs.shape[1])
        yield from zip(batch.inputs.split(most), batch.targets.split(most), strict=True)


def _loss_by_stream(model: Transformer, x_BTC: Tensor, targets_BT: Tensor) -> Tensor:
    """The gradient of the sum of the losses by the last residual stream, piece by piece of positions."""
    most = positions_of_a_piece(len(x_BTC), model.config.vocab_size)
    found = []
    for x, targets in zip(x_BTC.split(most, 1), targets_BT.split(most, 1), strict=True):
        piece = x.detach().requires_grad_()
        found += torch.autograd.grad(model.head(piece, targets).sum(), piece)
    return torch.cat(found, 1)


def _changed(model: Transformer, log_k_B: Tensor, more_k: Tensor, xi: Tensor) -> AbstractContextManager[None]:
    """Multiplies the k of all rows of a window by exp(log_k) and adds `more_k`; multiplies the output of heads by ξ."""
    return editing(
        model,
        budget=lambda layer, k_BHT: k_BHT * log_k_B.exp()[:, None, None] + more_k[layer],
        heads=lambda layer, out_BTHD: out_BTHD * xi[layer].to(out_BTHD.dtype),
    )
