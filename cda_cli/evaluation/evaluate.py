"""Loss over a split: each token but the first is predicted once, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cda_cli.data import IGNORE, Batch
from cda_cli.runtime import autocast, to_device


class Evaluation(NamedTuple):
    """loss: mean nats per token; its standard error takes a window as one observation, as tokens of one window share
    their context. bits_per_byte: loss in bits, spread over the bytes of the text."""

    loss: float
    standard_error: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_error: float
    tokens: int
    windows: int


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Nats per token to bits per byte of text, which does not depend on the tokenizer."""
    return loss / math.log(2) / bytes_per_token


def token_losses(model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cross-entropy of each target, nats, float32 [B, T]; 0 where the target is IGNORE."""
    with autocast(device, dtype):
        return model(to_device(batch.inputs, device), targets_BT=to_device(batch.targets, device))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    bytes_per_token: float,
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda windows: None,
) -> Evaluation:
    """Figures of `model` over `batches`; `advance` hears of the windows done. Leaves the model's mode as it was."""
    sums, counts = [], []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            sums.append(token_losses(model, batch, device, dtype).double().sum(-1).cpu())
            counts.append((batch.targets != IGNORE).sum(-1))
            advance(len(batch.inputs))
    finally:
        model.train(training)
    return _figures(torch.cat(sums), torch.cat(counts).double(), bytes_per_token)


def _figures(sums: Tensor, counts: Tensor, bytes_per_token: float) -> Evaluation:
    """From the loss and the number of tokens of each window: the ratio estimate of the mean and of its error."""
    windows, tokens = len(sums), counts.sum()
    loss = (sums.sum() / tokens).item()
    error = math.nan
    if windows > 1:
        residual = sums - loss * counts
        error = (math.sqrt(windows / (windows - 1)) * residual.norm() / tokens).item()
    return Evaluation(
        loss=loss,
        standard_error=error,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=bits_per_byte(loss, bytes_per_token),
        bits_per_byte_error=bits_per_byte(error, bytes_per_token),
        tokens=int(tokens.item()),
        windows=windows,
    )
