"""The solvers of rows by their kernels, which take scores of any dtype that they know and compute in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solve_spec import SolveSpec
from ..solvers.base import RowSolver, Visible
from ..solvers.exact import Exact
from ..solvers.iterative import Annealing, Iterative
from .row_launches import exact_backward, exact_forward, iterative_backward, iterative_forward


class ExactKernels(Exact):
    def prepared(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        return scores

    def solve(self, scores: Tensor, budget: Tensor, visible: Visible, spec: SolveSpec) -> tuple[Tensor, Tensor]:
        return exact_forward(scores, budget, spec.eps)

    def gradients(
        self, grad_weights: Tensor, scores: Tensor, budget: Tensor, saved: Tensor, spec: SolveSpec
    ) -> tuple[Tensor, Tensor]:
        return exact_backward(grad_weights, scores, saved, spec.eps)


class IterativeKernels(Iterative):
    def prepared(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        return scores

    def solve(self, scores: Tensor, budget: Tensor, visible: Visible, spec: SolveSpec) -> tuple[Tensor, Tensor]:
        return iterative_forward(scores, budget, *Annealing.of(spec))

    def gradients(
        self, grad_weights: Tensor, scores: Tensor, budget: Tensor, saved: Tensor, spec: SolveSpec
    ) -> tuple[Tensor, Tensor]:
        return iterative_backward(grad_weights, scores, budget, saved, *Annealing.of(spec))


KERNELS: dict[str, RowSolver] = {"exact": ExactKernels(), "iterative": IterativeKernels()}
