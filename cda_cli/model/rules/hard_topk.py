"""Hard top-k attention: the control of the soft top-k whose selection is not relaxed.

Sources: Explicit Sparse Transformer (arXiv 1912.11637) and Memory-efficient Transformers via Top-k Attention (arXiv
2106.06899), both with ε = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cda_cli.model.rules.base import AttentionRule
from cda_cli.ops import largest_entries


class HardTopK(AttentionRule):
    """The weights are softmax(scores/ε) over the ⌊attn_k⌋ largest scores of a row (at least one), and 0 elsewhere.

    Rows sum to 1. The selection has no gradient: only the kept scores have one. Which of equal scores are kept is open.
    """

    @property
    def kept(self) -> int:
        """The number of keys that a row keeps."""
        return max(1, int(self.config.attn_k))

    def weights(self, scores: Tensor, budget: Tensor, mask: Tensor) -> Tensor:
        scores = scores.masked_fill(~mask, -torch.inf)
        return (scores / self.eps).masked_fill(~largest_entries(scores, self.kept), -torch.inf).softmax(-1)

    def selection(self) -> str:
        return f"k = {self.kept}"

    def warnings(self) -> list[str]:
        warnings, k = super().warnings(), self.config.attn_k
        if k >= self.max_keys:
            warnings.append(f"attn_k {k:g} covers all {self.max_keys} keys of a row: hard-topk is tempered-softmax")
        elif k != self.kept:
            warnings.append(f"hard-topk keeps whole keys: with attn_k {k:g} a row keeps {self.kept}")
        return warnings
