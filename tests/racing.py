"""MKL 2024.x on a processor whose vector functions race in the first call of a process, made to do so every time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

NAMES = (
    "acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "sin",
    "sqrt", "tan", "tanh", "trunc",
)  # fmt: skip


def race_in_first_calls(patch: pytest.MonkeyPatch) -> None:
    """From now on the first call of a function, unless it is on one number, has half of its digits wrong in one half.

    That is the share of a thread that took the code of low accuracy (https://github.com/pytorch/pytorch/issues/188792).
    A race ends otherwise in another process, so the error is another one there.
    """
    called: set[tuple[str, torch.dtype]] = set()

    def racing(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(given: Tensor, *rest: Any, **options: Any) -> Tensor:
            result = function(given, *rest, **options)
            first, known = (name, given.dtype), (name, given.dtype) in called
            called.add(first)
            if not known and result.numel() > 1 and result.is_contiguous():
                error = 2.0**-12 * (1 + os.getpid() % 1021 / 1021)
                result.detach().view(-1)[result.numel() // 2 :] *= 1 + error
            return result

        return call

    for name in NAMES:
        for place, spelled in ((torch, name), (torch.Tensor, name), (torch.Tensor, f"{name}_")):
            patch.setattr(place, spelled, racing(name, getattr(place, spelled)))
