"""Measures the loss over a split: the model predicts each token but the first once, in windows that do not overlap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cda_cli.data import IGNORE, Batch
from cda_cli.evaluation.cuts import Cut
from cda_cli.model import Transformer, editing
from cda_cli.token_losses import token_losses

Way = Callable[[], AbstractContextManager[None]]  # what surrounds the forward passes of a measurement


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


class CutEvaluation(NamedTuple):
    """What `evaluate` measures under a cut, and how far its bits per byte are above those without it.

    `difference_error` is the standard error of the difference. Both were measured on the same windows, so what a window
    adds to both leaves no error.
    """

    cut: Cut
    evaluation: Evaluation
    difference: float
    difference_error: float

    def as_dict(self) -> dict[str, Any]:
        differences = {"difference": self.difference, "difference_error": self.difference_error}
        return {**asdict(self.cut), **differences, **self.evaluation._asdict()}


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
    (sums,), counts, sizes = _window_losses(model, (nullcontext,), batches, device, dtype, advance)
    return _summarise(sums, counts, sizes)


def evaluate_cuts(
    model: Transformer,
    batches: Iterable[Batch],
    cuts: Sequence[Cut],
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None] = lambda windows: None,
) -> tuple[Evaluation, list[CutEvaluation]]:
    """Does what `evaluate` does, and measures the model under each of `cuts` on the same windows.

    `advance` gets the number of windows of a batch once without a cut, and once for each cut.
    """
    ways: list[Way] = [nullcontext, *(partial(editing, model, cut) for cut in cuts)]
    (whole, *under_cuts), counts, sizes = _window_losses(model, ways, batches, device, dtype, advance)
    evaluation = _summarise(whole, counts, sizes)
    compared = []
    for cut, sums in zip(cuts, under_cuts, strict=True):
        found = _summarise(sums, counts, sizes)
        error = _ratio_error(sums - whole, sizes) / math.log(2)
        compared.append(CutEvaluation(cut, found, found.bits_per_byte - evaluation.bits_per_byte, error))
    return evaluation, compared


@torch.no_grad()
def _window_losses(
    model: nn.Module,
    ways: Sequence[Way],
    batches: Iterable[Batch],
    device: torch.device,
    dtype: torch.dtype,
    advance: Callable[[int], None],
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Returns for each of `ways` the losses [W] of the W windows, in nats, and their targets and bytes of text [W]."""
    sums: list[list[Tensor]] = [[] for _ in ways]
    counts, sizes = [], []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            for way, into in zip(ways, sums, strict=True):
                with way():
                    into.append(token_losses(model, batch, device, dtype).double().sum(-1).cpu())
                advance(len(batch.inputs))
            counts.append((batch.targets != IGNORE).sum(-1))
            sizes.append(batch.target_bytes)
    finally:
        model.train(training)
    return [torch.cat(each) for each in sums], torch.cat(counts), torch.cat(sizes)


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
