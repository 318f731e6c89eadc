"""Measures the loss over a split: the model predicts each token but the first once, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cda_cli.data import IGNORE, Batch
from cda_cli.token_losses import token_losses


class Evaluation(NamedTuple):
    """What `evaluate` measures, over `tokens` targets in `windows` windows.

    `loss` is the mean, in nats per token. `bits_per_byte` is the sum of the losses in bits, divided by `text_bytes`,
    the bytes of text that the targets stand for (see `Tokens.sizes`). Tokens of one window share their context, so both
    standard errors take a window as one observation.
    """

    loss: float
    standard_error: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_error: float
    tokens: int
    text_bytes: int
    windows: int


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Converts the nats of some tokens to bits per byte of their text: infinite if they stand for no text."""
    return nats / math.log(2) / text_bytes if text_bytes else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda windows: None,
) -> Evaluation:
    """Measures `model` over `batches`, in evaluation mode, and restores the mode of the model.

    `dtype` is that of the matrix products. `advance` gets the number of windows of each batch once it is done.
    """
    sums, counts, sizes = [], [], []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            sums.append(token_losses(model, batch, device, dtype).double().sum(-1).cpu())
            counts.append((batch.targets != IGNORE).sum(-1))
            sizes.append(batch.target_bytes)
            advance(len(batch.inputs))
    finally:
        model.train(training)
    return _summarise(torch.cat(sums), torch.cat(counts), torch.cat(sizes))


def _summarise(sums: Tensor, counts: Tensor, sizes: Tensor) -> Evaluation:
    """Summarises W windows: `sums` [W] of their losses, `counts` [W] of their targets, and `sizes` [W], the bytes of
    text that the targets stand for."""
    nats, tokens, text_bytes = sums.sum().item(), int(counts.sum()), int(sizes.sum())
    loss = nats / tokens
    return Evaluation(
        loss=loss,
        standard_error=_ratio_error(sums, counts),
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=bits_per_byte(nats, text_bytes),
        bits_per_byte_error=_ratio_error(sums, sizes) / math.log(2),
        tokens=tokens,
        text_bytes=text_bytes,
        windows=len(sums),
    )


def _ratio_error(sums: Tensor, counts: Tensor) -> float:
    """Returns the standard error of the ratio Σ sums / Σ counts, where each window is one observation.

    It is NaN for a single window. Source: Cochran, Sampling Techniques, equation 6.13.
    """
    windows, total = len(sums), counts.sum()
    if windows < 2 or not total:
        return math.nan
    residual = sums - sums.sum() / total * counts
    return (math.sqrt(windows / (windows - 1)) * residual.norm() / total).item()
