"""Coordinate-descent attention: the entropic soft top-k of the scores (docs/operator.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.model.layers import solver_settings
from cda_cli.model.rules.base import AttentionRule, Products
from cda_cli.ops import (
    Backend,
    Choice,
    choose_backend,
    decode_attention,
    fused_products,
    scores_at_once,
    soft_topk,
    soft_topk_attention,
)


class SoftTopK(AttentionRule):
    """The weights min(1, exp((s + a)/ε)) of a row sum to its budget k, which may be learned."""

    has_budget = True
    uses_operator = True

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(config, backend)
        self.solver = solver_settings(config)

    def weights(self, scores: Tensor, budget: Tensor, mask: Tensor) -> Tensor:
        return soft_topk(scores, budget, mask=mask, eps=self.eps, backend=self.backend, **self.solver)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, budget: float | Tensor, documents: Tensor | None = None
    ) -> Tensor:
        return soft_topk_attention(
            query,
            key,
            value,
            budget,
            eps=self.eps,
            scale=self.scale,
            documents=documents,
            backend=self.backend,
            largest_k=self.largest_budget,
            **self.solver,
        )

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, budget: float | Tensor, visible_B: Tensor | None
    ) -> Tensor:
        return decode_attention(
            query,
            key,
            value,
            visible_B,
            budget,
            eps=self.eps,
            scale=self.scale,
            backend=self.backend,
            largest_k=self.largest_budget,
            **self.solver,
        )

    @property
    def has_threshold(self) -> bool:  # type: ignore[override]  # a constant in the rules without solvers
        """True for the exact solver alone: the iterative one is near the weights that this says."""
        return self.config.solver == "exact"

    @property
    def divides_by_eps(self) -> bool:
        """True for the exact solver alone: the iterative one starts from eps_init, which does not change with ε."""
        return self.config.solver == "exact"

    def choose_backend(self, device: torch.device) -> Choice:
        return choose_backend(self.backend, self.config.solver, device, head_width=self.config.head_width)

    def products(self, backend: str, device: torch.device, dtype: torch.dtype) -> Products:
        """Counts the products of the fused kernels, of the blocks of PyTorch, or of the published operator."""
        seen = (self.config.seq_len + 1) / 2 + self.config.null_kv
        if backend == "colt5":
            return Products(2, 4, self.max_keys)
        if self._is_fused(backend):
            heads, length, width = self.config.heads, self.config.seq_len, self.config.head_width
            query = torch.Size((1, heads, length, width))
            key = torch.Size((1, self.config.kv_heads or heads, length + self.config.null_kv, width))
            return Products(*fused_products(query, key, dtype, device, self.config.attn_k <= 2), seen)
        return Products(2, 5, seen)

    def scratch(self, batch_size: int, device: torch.device, choice: Choice) -> dict[str, int]:
        """The code in blocks takes query, key, value and four gradients in float32, and six tensors of block scores.

        The fused backward may sum the gradient of the queries in float32, in padded heads (docs/kernels.md).
        """
        config, rows = self.config, batch_size * self.config.seq_len
        if self._is_fused(choice.name):
            padded = 1 << (config.head_width - 1).bit_length()
            return {"cda.fused_attention_backward": 4 * rows * config.heads * padded}
        block = min(rows * config.heads * self.max_keys, scores_at_once(device))
        return {"cda.soft_topk_attention": 4 * (7 * rows * config.heads * config.head_width + 6 * block)}

    def selection(self) -> str:
        return f"k learned up to {self.config.attn_k:g}" if self.learns_budget else f"k = {self.config.attn_k:g}"

    def warnings(self) -> list[str]:
        k, keys = self.config.attn_k, self.max_keys
        return [f"attn_k {k:g} covers all {keys} keys of a row: every weight is 1"] if k >= keys else []

    def _is_fused(self, backend: str) -> bool:
        return backend == "triton" and self.config.solver == "exact"
