"""Softmax attention, plain and with a temperature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cda_cli.model.rules.base import AttentionRule, Products, visible
from cda_cli.ops import can_run_kernels, decode_attention, for_each_query, soft_topk_attention


class Softmax(AttentionRule):
    """The weights are softmax(scores), by PyTorch's fused attention. `attn_eps` and `attn_k` have no effect."""

    has_eps = False
    has_threshold = True
    code = "PyTorch SDPA"

    def weights(self, scores: Tensor, budget: Tensor, mask: Tensor) -> Tensor:
        return scores.masked_fill(~mask, -torch.inf).softmax(-1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, budget: float | Tensor, documents: Tensor | None = None
    ) -> Tensor:
        return self._attend(query, key, value, self.scale, documents)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None) -> Tensor:
        """Computes attention with the scores scale · query·key.

        Queries that follow others take a mask in SDPA, which has T × S entries. On a GPU they take the kernels of the
        soft top-k, which with k = 1 and ε = 1 is softmax.
        """
        follow = key.shape[2] - query.shape[2] > self.config.null_kv
        if follow and documents is None and can_run_kernels(self.backend, query.device, query.dtype, query.shape[-1]):
            return soft_topk_attention(query, key, value, 1.0, eps=1.0, scale=scale, backend="triton")
        return _sdpa(query, key, value, scale, documents)

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, budget: float | Tensor, visible_B: Tensor | None
    ) -> Tensor:
        """A GPU has a kernel for the soft top-k, which with k = 1 and ε = 1 is softmax."""
        if not can_run_kernels(self.backend, query.device, query.dtype, query.shape[-1]):
            return super().decode(query, key, value, budget, visible_B)
        eps = self.eps if self.has_eps else 1.0
        return decode_attention(query, key, value, visible_B, 1.0, eps=eps, scale=self.scale, backend="triton")

    def products(self, backend: str, device: torch.device, dtype: torch.dtype) -> Products:
        """The backward computes the scores again. With null keys the mask is a tensor, and all scores are computed."""
        seen = (self.config.seq_len + 1) / 2
        return Products(2, 5, self.max_keys if self.config.null_kv else seen)


class TemperedSoftmax(Softmax):
    """The weights are softmax(scores/ε), the soft top-k with k = 1. `attn_k` has no effect."""

    has_eps = True

    def weights(self, scores: Tensor, budget: Tensor, mask: Tensor) -> Tensor:
        return super().weights(scores / self.eps, budget, mask)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, budget: float | Tensor, documents: Tensor | None = None
    ) -> Tensor:
        return self._attend(query, key, value, self.scale / self.eps, documents)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float, documents: Tensor | None) -> Tensor:
    """Computes causal softmax attention. The T queries are the last of the S positions."""
    H, T, S = query.shape[1], query.shape[2], key.shape[2]
    # PyTorch has a fused kernel for fewer key heads only in some dtypes, on some devices and without a mask.
    key, value = for_each_query(key, H), for_each_query(value, H)
    if S == T and documents is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    if T == 1 and documents is None:  # A single query sees every key.
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    mask = visible(S - T, T, S, documents, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
