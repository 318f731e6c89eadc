"""Backend "torch": plain PyTorch, in any place and any dtype, and attention in blocks of queries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..attention_blocks import attend_in_blocks, blockwise_attention
from ..attention_inputs import AttentionInputs, budget_of_each
from ..dense import differentiable_attention, for_each_query
from ..row_operator import differentiable_rows, weights_of_rows
from ..solve_spec import SolveSpec
from ..transforms import only_values, transformed
from .base import OperatorBackend


class TorchBackend(OperatorBackend):
    name = "torch"

    def rows(self, scores: Tensor, budget: Tensor, mask: Tensor | None, spec: SolveSpec) -> Tensor:
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        rows, budget = scores.reshape(-1, scores.shape[-1]), budget.reshape(-1)
        if transformed():
            weights, _ = differentiable_rows(rows, budget, spec)
            return weights.to(scores.dtype).view(scores.shape)
        return weights_of_rows(rows, budget, spec, self.name).view(scores.shape)

    def attention(
        self, inputs: AttentionInputs, spec: SolveSpec, largest_k: float | None, return_threshold: bool
    ) -> tuple[Tensor, Tensor | None]:
        if transformed():
            return differentiable_attention(inputs, spec)
        query, key, value, budget, *others = inputs
        budget = budget_of_each(budget, query)
        key, value = for_each_query(key, query.shape[1]), for_each_query(value, query.shape[1])
        run: Callable[..., tuple[Tensor, Tensor, Tensor]] = blockwise_attention
        if only_values(query, key, value, budget):
            run = attend_in_blocks
        output, threshold, _ = run(query, key, value, budget, *others, *spec.flat(), self.name)
        return output, threshold
