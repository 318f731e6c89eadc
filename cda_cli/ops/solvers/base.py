"""The interface of a solver of rows, which its code in PyTorch and its kernels share.

Shapes: R rows, n entries; m numbers that the backward needs of each row (`RowSolver.kept`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..solve_spec import SolveSpec

# Gives the number of visible entries of each row, [R]. Only the solvers that need it make the call.
Visible = Callable[[], Tensor]
# Weights [R, n] and what the backward needs, [m, R], of scores [R, n] and budgets [R].
Solve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class RowSolver(ABC):
    """How the weights of rows are found, and their gradients.

    Scores are −inf where they are masked. The arithmetic has the dtype of the budget, float32 or float64.
    """

    @abstractmethod
    def kept(self, spec: SolveSpec) -> int:
        """m, how many numbers of each row the backward needs."""

    @abstractmethod
    def solve(self, scores: Tensor, budget: Tensor, visible: Visible, spec: SolveSpec) -> tuple[Tensor, Tensor]:
        """Weights [R, n] and what the backward needs, [m, R], of `prepared` scores [R, n] and the k of each row [R]."""

    @abstractmethod
    def gradients(
        self, grad_weights: Tensor, scores: Tensor, budget: Tensor, saved: Tensor, spec: SolveSpec
    ) -> tuple[Tensor, Tensor]:
        """(∂L/∂s [R, n], ∂L/∂k [R]) for ∂L/∂λ [R, n], `prepared` scores and what `solve` saved."""

    @abstractmethod
    def weights(self, scores: Tensor, saved: Tensor, spec: SolveSpec) -> Tensor:
        """The weights [R, n] that `solve` found, from what it saved."""

    @abstractmethod
    def threshold(self, saved: Tensor, spec: SolveSpec) -> Tensor:
        """The threshold a of rows [...], of whose scores, held `in_units`, [m, ...] was saved.

        It is that of the scores themselves, for `spec` as the user gave it; +inf where k covers all that is visible.
        """

    @abstractmethod
    def differentiable(self, scores: Tensor, budget: Tensor, solve: Solve, spec: SolveSpec) -> tuple[Tensor, Tensor]:
        """Weights [R, n] and the threshold a [R] without gradient, for any number of derivatives and any transform.

        All of it is made of PyTorch's own operators but for `solve`, which gives the solution of rows that are cut off
        from the gradient. scores [R, n] have the dtype of the arithmetic; n is at least 1.
        """

    def prepared(self, scores: Tensor, dtype: torch.dtype) -> Tensor:
        """Scores of any dtype as `solve` takes them, for arithmetic in `dtype`. A row may be all masked."""
        return scores.to(dtype)

    def in_units(self, spec: SolveSpec) -> tuple[float, SolveSpec]:
        """The unit in which a caller that makes the scores itself may hold them, and `spec` in this unit."""
        return 1.0, spec

    def save_unseen(self, saved: Tensor) -> None:
        """Fills `saved` [m, ...] with what `solve` saves of rows that see nothing."""
        saved.zero_()

    def weights_and_gradients(
        self, grad_weights: Tensor, scores: Tensor, budget: Tensor, saved: Tensor, spec: SolveSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`weights` and both `gradients`, for a solver that has part of their work in common."""
        return self.weights(scores, saved, spec), *self.gradients(grad_weights, scores, budget, saved, spec)
