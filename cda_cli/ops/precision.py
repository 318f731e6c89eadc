"""The precision that the operator computes in, whatever the dtype of its inputs and whatever autocast would have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays float64; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose first argument is a tensor, with autocast off on that tensor's device.

    Autocast would turn the products of scores into bf16, and the soft top-k divides scores by a small ε.
    """

    @functools.wraps(function)
    def without_autocast(*args: P.args, **kwargs: P.kwargs) -> R:
        assert isinstance(args[0], Tensor)
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args, **kwargs)

    return without_autocast
