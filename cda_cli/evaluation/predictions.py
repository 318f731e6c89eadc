"""What a model predicts of each token of a text: its loss, the likeliest token and how sure the model is of that.

Shapes: B rows of a batch, T positions, C width of the residual stream, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cda_cli.data import Batch
from cda_cli.model import Transformer
from cda_cli.model.loss import positions_of_a_piece
from cda_cli.runtime import autocast, to_device


class Predictions(NamedTuple):
    """What a model predicts of the tokens `targets`, int64 [B, T], which are IGNORE where a token does not count.

    `losses` are those of `token_losses`. `likeliest`, int64, is the token of the largest probability, which is
    `confidence`, float32; all [B, T].
    """

    targets: Tensor
    losses: Tensor
    likeliest: Tensor
    confidence: Tensor


@torch.no_grad()
def token_predictions(model: Transformer, batch: Batch, device: torch.device, dtype: torch.dtype) -> Predictions:
    """Computes what `token_losses` does, and the likeliest tokens, piece by piece of positions.

    So memory does not grow with the number of tokens times the vocabulary.
    """
    targets_BT = to_device(batch.targets, device)
    most = positions_of_a_piece(len(targets_BT), model.config.vocab_size)
    with autocast(device, dtype):
        x_BTC = model.stream(to_device(batch.inputs, device))
        pieces = zip(x_BTC.split(most, 1), targets_BT.split(most, 1), strict=True)
        found = [_of_logits(model.head(x, None).float(), targets) for x, targets in pieces]
    return Predictions(targets_BT, *(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def _of_logits(logits_BTV: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    losses = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="none")
    largest, likeliest = logits_BTV.max(-1)
    return losses.view_as(targets_BT), likeliest, (largest - logits_BTV.logsumexp(-1)).exp()
