"""The feed-forward layer: a GELU, or the soft top-k weights of the hidden units (as published, the weights alone)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cda_cli.config import ModelConfig
from cda_cli.model.layers import solver_settings
from cda_cli.model.observe import FeedForwardSeen, Observer
from cda_cli.ops import Backend, soft_topk


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, backend: Backend) -> None:
        super().__init__()
        self.config, self.layer, self.backend = config, layer, backend
        self.observer: Observer | None = None
        self.proj_in = nn.Linear(config.dim, config.ff_width)
        self.proj_out = nn.Linear(config.ff_width, config.dim)

    def forward(self, x_BTC: Tensor) -> Tensor:
        config, hidden = self.config, self.proj_in(x_BTC)
        if config.ff == "gelu":
            activations = F.gelu(hidden)
        else:
            activations = soft_topk(
                hidden, config.ff_k, eps=config.ff_eps, backend=self.backend, **solver_settings(config)
            )
        if self.observer is not None:
            self.observer(FeedForwardSeen(self.layer, activations.detach()))
        return self.proj_out(activations)
