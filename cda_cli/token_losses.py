"""Computes the loss of each token, from which training takes its gradients and evaluation its metrics."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cda_cli.data import Batch
from cda_cli.runtime import autocast, to_device


def token_losses(model: nn.Module, batch: Batch, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the cross-entropy of each target, nats, float32 [B, T]; 0 if the target is IGNORE.

    `dtype` is that of the matrix products.
    """
    with autocast(device, dtype):
        return model(to_device(batch.inputs, device), targets_BT=to_device(batch.targets, device))
