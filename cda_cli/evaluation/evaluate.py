"""Loss over a split: each token but the first is predicted once, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cda_cli.data import IGNORE, Batch
from cda_cli.token_losses import token_losses


class Evaluation(NamedTuple):
    """loss: mean nats per token; its standard error takes a window as one observation, as tokens of one window share
    their context. bits_per_byte: all nats in bits, spread over `text_bytes`, those that the tokens which were counted
    stand for (see `Tokens.sizes`)."""

    loss: float
    standard_error: float
    perplexity: float
    bits_per_byte: float
    bits_per_byte_error: float
    tokens: int
    text_bytes: int
    windows: int


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """The nats of some tokens as bits per byte of their text; infinite where they stand for no text."""
    return nats / math.log(2) / text_bytes if text_bytes else math.inf


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda windows: None,
) -> Evaluation:
    """Figures of `model` over `batches`; `advance` hears of the windows done. Leaves the model's mode as it was."""
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
    return _figures(torch.cat(sums), torch.cat(counts), torch.cat(sizes))


def _figures(sums: Tensor, counts: Tensor, sizes: Tensor) -> Evaluation:
    """From the loss of each window, the number of its tokens, and their bytes."""
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
    """The standard error of the ratio Σ sums / Σ counts, a window being one observation; NaN of a single one."""
    windows, total = len(sums), counts.sum()
    if windows < 2 or not total:
        return math.nan
    residual = sums - sums.sum() / total * counts
    return (math.sqrt(windows / (windows - 1)) * residual.norm() / total).item()
