"""The backends of the operator, by their names, and which of them runs.

To add a backend, write its file, add a line to `BACKENDS` and its name to `Backend`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

from ..solve_spec import Solver
from ..solvers import SOLVERS
from ..transforms import transformed
from .base import OperatorBackend
from .colt5 import Colt5Backend
from .pytorch import TorchBackend
from .triton_kernels import TritonBackend

__all__ = ["BACKENDS", "Backend", "Choice", "OperatorBackend", "can_run_kernels", "choose_backend"]

Backend = Literal["auto", "torch", "triton", "colt5"]

BACKENDS: dict[str, OperatorBackend] = {
    backend.name: backend for backend in (TorchBackend(), TritonBackend(), Colt5Backend())
}


class Choice(NamedTuple):
    """The backend that runs and the reason in a few words."""

    name: Literal["torch", "triton", "colt5"]
    reason: str


def choose_backend(
    backend: Backend, solver: Solver, device: torch.device, dtype: torch.dtype = torch.float32, head_width: int = 0
) -> Choice:
    """The backend for `solver` on tensors of `device` and `dtype`, in attention with heads of `head_width` channels.

    "auto" is "triton" on a GPU that can run it and "torch" elsewhere. Forcing a backend that cannot run is a ValueError
    that names the remedy.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, not {solver!r}")
    if backend == "auto":
        return _choose_automatically(solver, device, dtype, head_width)
    obstacle = BACKENDS[backend].supports(solver, device, dtype, head_width)
    if obstacle is not None:
        raise ValueError(BACKENDS[backend].refusal(obstacle))
    return Choice(backend, "asked for")


def can_run_kernels(backend: Backend, device: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether a layer may use the kernels of backend "triton" in place of PyTorch's code, which does the same.

    `backend` is that of the model. Where "triton" is asked for and cannot run, the operator refuses it, if the model
    has the operator. In a transform of torch.func no kernel may run.
    """
    if backend not in ("auto", "triton") or transformed():
        return False
    if backend == "auto":
        return choose_backend(backend, "exact", device, dtype, head_width).name == "triton"
    return BACKENDS["triton"].supports("exact", device, dtype, head_width) is None


def _choose_automatically(solver: Solver, device: torch.device, dtype: torch.dtype, head_width: int) -> Choice:
    if device.type == "cpu":  # also where Triton's interpreter could run the kernels
        return Choice("torch", "the kernels of backend 'triton' are for a GPU")
    obstacle = BACKENDS["triton"].supports(solver, device, dtype, head_width)
    return Choice("triton", "this GPU runs its kernels") if obstacle is None else Choice("torch", obstacle)
