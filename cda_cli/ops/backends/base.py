"""The interface of a backend: the code that computes the operator."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..attention_inputs import AttentionInputs
from ..decoding import DecodingInputs, dense_decoding
from ..solve_spec import Solver, SolveSpec


class OperatorBackend(ABC):
    """Computes rows and attention. Its arguments were checked by the doors, and `supports` found no obstacle."""

    name: str

    def supports(self, solver: Solver, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
        """Why the backend cannot run `solver` on tensors of `device` and `dtype`, or None if it can.

        `head_width` is that of attention; it is 0 for rows.
        """
        return None

    def refusal(self, obstacle: str) -> str:
        """The sentence for a user who asked for this backend, where `supports` found `obstacle`."""
        return f"backend '{self.name}' cannot run: {obstacle}; choose backend 'torch'"

    @abstractmethod
    def rows(self, scores: Tensor, budget: Tensor, mask: Tensor | None, spec: SolveSpec) -> Tensor:
        """Weights [..., n] of scores [..., n], in their dtype.

        budget [...] is the k of each row in the dtype of the arithmetic; mask [..., n] is True where an entry is
        visible. n is at least 1.
        """

    @abstractmethod
    def attention(
        self, inputs: AttentionInputs, spec: SolveSpec, largest_k: float | None, return_threshold: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Output [B, H, T, D], and the threshold a [B, H, T], which may be None where it is not asked for.

        `largest_k` is an upper bound of the budget, where one is known.
        """

    def decode(self, inputs: DecodingInputs) -> Tensor:
        """Output [B, H, T, D] of a few queries, without a gradient."""
        return dense_decoding(inputs, lambda scores, budget, spec: self.rows(scores, budget, None, spec))
