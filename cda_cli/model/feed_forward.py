"""The feed-forward layer: a matrix into its units (two with a gate), an activation (`activations`), a matrix back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cda_cli.config import ModelConfig
from cda_cli.model.activations import Gated, feed_forward_activation
from cda_cli.model.auxiliary_losses import ActivationL1
from cda_cli.model.observe import ObservedFeedForward, Observer
from cda_cli.ops import Backend


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, backend: Backend) -> None:
        super().__init__()
        self.layer = layer
        self.activation = feed_forward_activation(config, backend)
        self.observer: Observer | None = None
        self.auxiliary_loss: ActivationL1 | None = None  # of training, where gradients are taken
        self.proj_in = nn.Linear(config.dim, config.ff_units, bias=config.ff_bias)
        self.proj_out = nn.Linear(config.ff_units, config.dim, bias=config.ff_bias)
        gate = self.activation.gate_width
        self.proj_gate = nn.Linear(config.dim, gate, bias=config.ff_bias) if gate else None

    def factors(self, x_BTC: Tensor) -> Tensor | None:
        """Returns the factors [B, T, G] of the gate; None without a gate."""
        if self.proj_gate is None:
            return None
        assert isinstance(self.activation, Gated)
        return self.activation.factors(self.proj_gate(x_BTC))

    def forward(self, x_BTC: Tensor) -> Tensor:
        factors = self.factors(x_BTC)
        activations = self.activation(self.proj_in(x_BTC), factors)
        if self.observer is not None:
            chosen = factors.detach() > 0 if factors is not None and self.activation.block_size else None
            self.observer(ObservedFeedForward(self.layer, activations.detach(), self.proj_out.weight.detach(), chosen))
        if self.auxiliary_loss is not None and torch.is_grad_enabled():
            activations = self.auxiliary_loss(activations)
        return self.proj_out(activations)
