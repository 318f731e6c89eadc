"""What is asked of a solver, as one object from the doors to the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

Solver = Literal["exact", "iterative"]


class SolverSettings(TypedDict):
    """The arguments that choose and tune a solver, as both doors take them."""

    solver: Solver
    n_iters: int
    eps_init: float
    eps_decay: float


class SolveSpec(NamedTuple):
    """A solver and its numbers. The doors build it by `checks.checked_spec`, which refuses what has no meaning."""

    solver: Solver
    eps: float
    n_iters: int = 1
    eps_init: float = 1.0
    eps_decay: float = 1.0

    def flat(self) -> tuple[str, int, list[float]]:
        """`solver`, `n_iters` and `schedule`, as the custom operators take them: their arguments are plain values.

        `n_iters` is an argument of its own, so that torch.compile takes any number of iterations with one graph.
        """
        return self.solver, self.n_iters, [self.eps, self.eps_init, self.eps_decay]

    @classmethod
    def of_flat(cls, solver: str, n_iters: int, schedule: Sequence[float]) -> SolveSpec:
        """The object of which `flat` gave these."""
        eps, eps_init, eps_decay = schedule
        return cls(solver, eps, n_iters, eps_init, eps_decay)  # type: ignore[arg-type]  # one of `Solver`
