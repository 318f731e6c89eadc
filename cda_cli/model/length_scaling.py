"""Factors on the scores that follow the number of keys which a query sees (`model.length_scaling`).

The more keys, the flatter is a softmax of equal scores. A factor that grows with their number keeps it sharp.

Shapes: B batch, H heads, h heads that are scaled (the last ones, see `ModelConfig.scaled_heads`), T queries, D head
width, C width of the residual stream.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cda_cli.config import ModelConfig
from cda_cli.model.layers import head_linear
from cda_cli.model.left_padding import Start, row_positions

# softplus(−4) is 0.02. The published code has rows that begin with a factor of 5, and are sharp before they learn.
FIRST_BETA = -4.0


class LengthScaling(nn.Module, ABC):
    """A factor on the scores of each query and head. It is applied to the query, of which the scores are products."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.null_keys = config.null_kv

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears from the normed input to a number for each scaled head, by the names of their logits."""
        return {}

    @abstractmethod
    def factor(self, keys: Tensor, logits: Callable[[str], Tensor]) -> Tensor:
        """Returns the factors [B or 1, h, T] for the numbers of `keys` [B or 1, 1, T]; `logits` are [B, h, T]."""

    def forward(
        self, query_BHTD: Tensor, start: Start, padding_B: Tensor | None, logits: Callable[[str], Tensor]
    ) -> Tensor:
        """Scales the queries at their `row_positions`, each of which sees the keys up to its own, and the null keys."""
        H, T = query_BHTD.shape[1:3]
        dtype = torch.promote_types(query_BHTD.dtype, torch.float32)
        positions = row_positions(start, T, padding_B)
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=query_BHTD.device)
        keys = (positions + (1 + self.null_keys)).to(dtype).view(-1, 1, T)
        factor = self.factor(keys, lambda name: logits(name).to(dtype))
        factor = F.pad(factor, (0, 0, H - factor.shape[1], 0), value=1.0)
        return (query_BHTD * factor.unsqueeze(-1)).to(query_BHTD.dtype)


class LogScaling(LengthScaling):
    """The factor is s·log n for n keys, with a learned s of each head, which makes it 1 at the context length at first.

    Source: Scalable-Softmax (arXiv 2501.19399).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        first = 1 / math.log(config.seq_len + config.null_kv)
        self.scale = nn.Parameter(torch.full((config.scaled_heads,), first))

    def factor(self, keys: Tensor, logits: Callable[[str], Tensor]) -> Tensor:
        return self.scale.to(keys.dtype).unsqueeze(1) * keys.log()


class AdaptiveScaling(LengthScaling):
    """The factor is 1 + softplus(β)·log(n + 1)^(2·tanh γ) for n keys; β and γ are linear in the normed input.

    It begins near 1, whatever n is. Source: ASEntmax (arXiv 2506.16640) and its code, where a query at position p has
    n = p + 1, and β and the weights of γ begin as those of any linear.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.to_beta = head_linear(config.dim, config.scaled_heads, FIRST_BETA)
        self.to_gamma = head_linear(config.dim, config.scaled_heads, 0.0)
        nn.init.zeros_(self.to_gamma.weight)

    @property
    def linears(self) -> dict[str, nn.Linear]:
        return {"beta": self.to_beta, "gamma": self.to_gamma}

    def factor(self, keys: Tensor, logits: Callable[[str], Tensor]) -> Tensor:
        return 1 + F.softplus(logits("beta")) * (keys + 1).log().pow(2 * logits("gamma").tanh())


SCALINGS: dict[str, type[LengthScaling]] = {"log-n": LogScaling, "adaptive": AdaptiveScaling}
