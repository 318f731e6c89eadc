"""Measures the loss over a split: the model predicts each token but the first once, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from cda_cli.data import Batch
from cda_cli.evaluation.intervals import ratio_error
from cda_cli.evaluation.sums import Sums, joined, measure


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
    (sums,) = joined(measure(model, batches, device, dtype, advance=advance))
    return summarise(sums, len(sums))


def summarise(sums: Sums, windows: int) -> Evaluation:
    """Summarises `windows` windows, by their sums or those of groups of them, which are then the observations."""
    nats, tokens, text_bytes = sums.nats.sum().item(), int(sums.tokens.sum()), int(sums.text_bytes.sum())
    loss = nats / tokens
    return Evaluation(
        loss=loss,
        standard_error=ratio_error(sums.nats, sums.tokens),
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=bits_per_byte(nats, text_bytes),
        bits_per_byte_error=ratio_error(sums.nats, sums.text_bytes) / math.log(2),
        tokens=tokens,
        text_bytes=text_bytes,
        windows=windows,
    )
