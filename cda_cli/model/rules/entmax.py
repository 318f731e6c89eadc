"""Entmax attention: sparse weights without a budget, by the package `entmax`, which is an optional extra.

Source: Sparse Sequence-to-Sequence Models (arXiv 1905.05702), with α = 1.5.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from cda_cli.model.rules.base import AttentionRule
from cda_cli.ops import Choice


class Entmax(AttentionRule):
    """The weights are entmax 1.5 of scores/ε: max(0, s/(2·ε) − τ)², with the τ for which a row sums to 1."""

    def weights(self, scores: Tensor, budget: Tensor, mask: Tensor) -> Tensor:
        from entmax import entmax15

        return entmax15((scores / self.eps).masked_fill(~mask, -torch.inf), dim=-1)

    def choose_backend(self, device: torch.device) -> Choice:
        """Also raises ValueError if the package is missing."""
        if importlib.util.find_spec("entmax") is None:
            raise ValueError(
                "attention 'entmax' needs the package entmax; install it (pip install entmax), or choose another "
                "model.attention"
            )
        from entmax import entmax15

        # Compiled code cannot look into its backward, and would run it, and the sort before it, kernel by kernel.
        torch.compiler.allow_in_graph(entmax15)
        return super().choose_backend(device)
