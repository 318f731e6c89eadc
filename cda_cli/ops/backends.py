"""Which backend runs, and why."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypedDict, get_args

Backend = Literal["auto", "torch", "colt5"]
Solver = Literal["exact", "iterative"]


class SolverSettings(TypedDict):
    """The arguments that choose and tune a solver, as both doors take them."""

    solver: Solver
    n_iters: int
    eps_init: float
    eps_decay: float


class Choice(NamedTuple):
    """The backend that runs, and the reason in a few words."""

    name: Literal["torch", "colt5"]
    reason: str


def choose_backend(backend: Backend, solver: Solver) -> Choice:
    """The backend for `solver`. Forcing one that cannot run is a ValueError that names the remedy."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, not {solver!r}")
    if backend == "colt5" and solver == "exact":
        raise ValueError("backend 'colt5' has no exact solver; choose solver 'iterative' or backend 'torch'")
    if backend == "auto":
        return Choice("torch", "the only backend with both solvers")
    return Choice(backend, "asked for")
