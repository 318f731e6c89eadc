"""The solvers of rows, by their names (`solve_spec.Solver`).

To add a solver, write its file and add a line to `SOLVERS`. A backend that has code of its own for rows, as the kernels
are, has a dict like it in `CODE`.
"""

from __future__ import annotations

from collections.abc import Callable

from .base import RowSolver
from .exact import Exact
from .iterative import Iterative

__all__ = ["CODE", "SOLVERS", "RowSolver", "row_solver"]

SOLVERS: dict[str, RowSolver] = {"exact": Exact(), "iterative": Iterative()}


def _kernels() -> dict[str, RowSolver]:
    from ..triton.row_solvers import KERNELS  # imports triton, which a machine may lack

    return KERNELS


CODE: dict[str, Callable[[], dict[str, RowSolver]]] = {"torch": lambda: SOLVERS, "triton": _kernels}


def row_solver(solver: str, backend: str) -> RowSolver:
    """The code of `backend` for `solver`."""
    return CODE[backend]()[solver]
