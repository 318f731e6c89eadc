"""The precision of the operator's arithmetic, which depends neither on the dtype of half inputs nor on autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

FLOAT32_MAX = torch.finfo(torch.float32).max

# The functions of one argument that PyTorch takes from MKL's vector library (ATen/cpu/vml.h).
VECTOR_FUNCTIONS = tuple(
    getattr(torch, name)
    for name in (
        "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "sin",
        "sqrt", "tan", "tanh", "trunc",
    )
)  # fmt: skip


def settle_vector_functions() -> None:
    """Calls each vector function once, on one number, so that no first call is made by many threads.

    MKL chooses the code of a vector function in its first call. In the releases 2024.x, with which PyTorch is built,
    two threads that make this call together race, and one of them computes its share with half of the digits, without
    an error (https://github.com/pytorch/pytorch/issues/188792). A resumed run then differed from the uncut one: the
    first call of its process computes the table of rotary positions.
    """
    for dtype in (torch.float32, torch.float64):
        number = torch.full((1,), 0.5, dtype=dtype, device="cpu")
        for function in VECTOR_FUNCTIONS:
            function(number)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 for float64, and float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts `tensor` for F.scaled_dot_product_attention, or None if it does not."""
    kind = tensor.device.type
    if kind != "meta" and tensor.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def in_own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`function` with autocast off on the device of its first argument: a tensor, or a tuple that starts with one.

    Autocast would turn the products of scores into bf16, and the soft top-k divides scores by a small ε.
    """

    @functools.wraps(function)
    def without_autocast(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0][0] if isinstance(args[0], tuple) else args[0]
        assert isinstance(first, Tensor)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return without_autocast
