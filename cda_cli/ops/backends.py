"""Which backend runs, and why."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, TypedDict, get_args

import torch

Backend = Literal["auto", "torch", "triton", "colt5"]
Solver = Literal["exact", "iterative"]

# What the kernels ask of a GPU: bf16 in the matrix units and asynchronous copies (Ampere and later).
LEAST_CAPABILITY = (8, 0)
LEAST_TRITON = (3, 6)
# A tile of wider heads does not fit the memory of a multiprocessor.
WIDEST_HEAD = 256


class SolverSettings(TypedDict):
    """The arguments that choose and tune a solver, as both doors take them."""

    solver: Solver
    n_iters: int
    eps_init: float
    eps_decay: float


class Choice(NamedTuple):
    """The backend that runs, and the reason in a few words."""

    name: Literal["torch", "triton", "colt5"]
    reason: str


def choose_backend(
    backend: Backend, solver: Solver, device: torch.device, dtype: torch.dtype = torch.float32, head_width: int = 0
) -> Choice:
    """The backend for `solver` on tensors of `device` and `dtype`, in attention with heads of `head_width` channels.

    "auto" is "triton" on a GPU that can run it and "torch" elsewhere. Forcing a backend that cannot run is a ValueError
    that names the remedy.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, not {solver!r}")
    if backend == "colt5" and solver == "exact":
        raise ValueError("backend 'colt5' has no exact solver; choose solver 'iterative' or backend 'torch'")
    if backend in ("auto", "triton"):
        if backend == "auto" and device.type == "cpu":
            return Choice("torch", "the kernels of backend 'triton' are for a GPU")
        obstacle = _triton_obstacle(device, dtype)
        if solver == "exact" and head_width > WIDEST_HEAD:
            obstacle = f"its attention holds heads of up to {WIDEST_HEAD} channels, not {head_width}"
        if backend == "auto":
            return Choice("torch", obstacle) if obstacle else Choice("triton", "this GPU runs its kernels")
        if obstacle:
            raise ValueError(f"backend 'triton' cannot run: {obstacle}; choose backend 'torch'")
        return Choice("triton", "asked for")
    return Choice("colt5" if backend == "colt5" else "torch", "asked for")


def _triton_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    """Why the Triton kernels cannot run, or nothing."""
    return _find_triton_obstacle(device, dtype)


# What torch.compiler.assume_constant_result sets, and all it does but to import torch._dynamo, which takes as long as
# the rest of torch.
_triton_obstacle._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache  # asked at every call of the operator
def _find_triton_obstacle(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "the kernels compute in float32, and these tensors are float64"
    try:
        import triton
    except (ImportError, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "the package triton is not installed"
        return f"the package triton cannot be imported ({error})"
    if tuple(map(int, triton.__version__.split(".")[:2])) < LEAST_TRITON:
        return f"the kernels need triton 3.6 or later, and this is {triton.__version__}"
    if device.type == "cpu":
        interpreted = triton.knobs.runtime.interpret
        return "" if interpreted else "its kernels are for a GPU (or for TRITON_INTERPRET=1, to check them)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels were made for NVIDIA GPUs, not for {device.type}"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return "the kernels need a GPU of compute capability 8.0 or later"
    return ""
