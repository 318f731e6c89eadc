"""Finds what `cda doctor` shows: versions, devices, backends, and checks of the operator on this machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cda_cli.data import cache_folder
from cda_cli.ops import (
    choose_backend,
    reference_attention,
    reference_gradients,
    reference_soft_topk,
    soft_topk,
    soft_topk_attention,
)
from cda_cli.runtime import describe_device

PACKAGES = ("cda-cli", "torch", "triton", "colt5-attention", "einops", "datasets", "tokenizers", "safetensors", "typer")
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # u: half a unit in the last place of 1


class Check(NamedTuple):
    """The largest error of a quantity against its float64 value, and the most that it may be."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


class Cache(NamedTuple):
    """The folder that keeps what is prepared from texts, and how many bytes are in it."""

    folder: str
    size: int


class Diagnosis(NamedTuple):
    versions: dict[str, str]
    devices: list[str]
    backends: dict[str, str]
    cache: Cache
    checks: list[Check]

    def as_dict(self) -> dict[str, Any]:
        checks = [check._asdict() | {"passed": check.passed} for check in self.checks]
        return self._asdict() | {"cache": self.cache._asdict(), "checks": checks}


def diagnose() -> Diagnosis:
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    choices = {
        (device, solver): choose_backend("auto", solver, device)
        for device in devices
        for solver in ("exact", "iterative")
    }
    return Diagnosis(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        devices=[describe_device(device) for device in devices],
        backends={
            f"{device}, {solver}": f"{choice.name} ({choice.reason})" for (device, solver), choice in choices.items()
        },
        cache=_cache(),
        checks=[check for device in devices for check in (*_row_checks(device), *_attention_checks(device))],
    )


def _cache() -> Cache:
    """Counts the files that are there: another process may write or remove some meanwhile."""
    folder, size = cache_folder(), 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                size += Path(place, name).lstat().st_size
    return Cache(str(folder), size)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _row_checks(device: torch.device) -> list[Check]:
    """Checks the exact row operator in float32, on rows with ties, a far leader, masks and fractional k."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(64, 333, generator=generator)
    scores[0] = 0.5
    scores[1, 7] = 100.0
    scores[2, :4] = 9.0
    mask = torch.rand(64, 333, generator=generator) < 0.8
    mask[3] = False
    grad = torch.randn(64, 333, generator=generator)
    checks = []
    for k, eps in ((2.0, 0.1), (2.5, 0.01), (128.0, 1.0)):
        leaf = scores.clone().to(device).requires_grad_()
        budget = torch.full((64,), k, device=device, requires_grad=True)
        weights = soft_topk(leaf, budget, eps=eps, mask=mask.to(device))
        weights.backward(grad.to(device))
        assert leaf.grad is not None
        assert budget.grad is not None
        solution = reference_soft_topk(scores, k, eps, mask)
        grad_scores, grad_k = reference_gradients(solution, k, eps, grad)
        tolerance = 1e-5 + 4 * ROUNDING[torch.float32] * scores.abs().max().item() / eps
        where = f"{device}: rows, float32, k = {k:g}, ε = {eps:g}"
        checks += [
            Check(f"{where}: weights", _error(weights, solution.weights), tolerance),
            Check(f"{where}: ∂s", _error(leaf.grad, grad_scores), 1e-4 * grad_scores.abs().max().item()),
            Check(f"{where}: ∂k", _error(budget.grad, grad_k), 1e-4 * grad_k.abs().max().item()),
        ]
    return checks


def _attention_checks(device: torch.device) -> list[Check]:
    """Checks the output of causal attention with two null keys in front, in float32 and bf16."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 2, T, 16, generator=generator) for T in (65, 67, 67))
    checks = []
    for dtype, u in ROUNDING.items():
        q, k, v = (x.to(device, dtype) for x in (query, key, value))
        output = soft_topk_attention(q, k, v, 2.0)
        expected, _ = reference_attention(q.cpu(), k.cpu(), v.cpu(), 2.0, eps=0.1, scale=0.25, causal=True)
        name = f"{device}: attention, {str(dtype).removeprefix('torch.')}, k = 2"
        # Scores reach about 5. The rounding of their float32 products is divided by ε on its way into λ. The output is
        # rounded to its dtype; the kernels also round the weights, since matrix units sum the values.
        roundings = 2 if choose_backend("auto", "exact", device).name == "triton" else 1
        tolerance = (1e-5 + 4 * ROUNDING[torch.float32] * 5 / 0.1 + roundings * u) * expected.abs().max().item()
        checks.append(Check(name, _error(output, expected), tolerance))
    return checks


def _error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual.detach().double().cpu() - expected).abs().max().item()
