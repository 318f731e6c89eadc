"""The launches of the row kernels, for both solvers and a selection: a kernel reads a row once and writes it once.

One program holds a row of up to `REGISTER_LIMIT` scores in registers; several short rows share a program. A longer row
is read again, in parts, for every step of its solver. Scores are float32, bf16 or fp16, and −inf where they are masked;
the arithmetic is float32. The kernels save what the solvers in PyTorch save, except that the shift of the exact dual
may be any score near the solution, and its peak may be above 1.

Shapes: R rows, n entries. In the kernels [ROWS, BLOCK] tensors, or [BLOCK] where the row comes in parts.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
from torch import Tensor

from .rows_exact import (
    exact_backward_kernel,
    exact_backward_parts_kernel,
    exact_forward_kernel,
    exact_forward_parts_kernel,
)
from .rows_iterative import (
    iterative_backward_kernel,
    iterative_backward_parts_kernel,
    iterative_forward_kernel,
    iterative_forward_parts_kernel,
)
from .rows_selection import largest_entries_kernel

REGISTER_LIMIT = 16384  # the largest n of a row that is held in registers
# In generation, programs of so many rows leave multiprocessors idle, so each takes one row, and more warps. In training
# a row is summed in the same order, however many there are: a small batch has as few.
FEW_ROWS = 512
PART = 4096  # float32 entries of a longer row that are read at a time; twice as many in half precision


def exact_forward(rows: Tensor, budget: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Weights [R, n] in the dtype of `rows` [R, n], and the dual [2, R] float32 (shift, peak) of `Dual`.

    budget [R] float32.
    """
    R, n = rows.shape
    rows, budget = rows.contiguous(), budget.contiguous()
    weights, saved = torch.empty_like(rows), torch.empty((2, R), dtype=torch.float32, device=rows.device)
    scale = math.log2(math.e) / eps
    with torch.cuda.device_of(rows):
        if n > REGISTER_LIMIT:
            exact_forward_parts_kernel[(R,)](rows, budget, weights, saved, R, n, scale, BLOCK=_part(rows), num_warps=8)
        elif R:
            grid, options = _tile(R, n, entries_per_thread=64)
            exact_forward_kernel[grid](rows, budget, weights, saved, R, n, scale, **options)
    return weights, saved


def exact_backward(grad_weights: Tensor, rows: Tensor, saved: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(∂L/∂s [R, n] in the dtype of `rows`, ∂L/∂k [R] float32) for grad_weights [R, n] and the saved dual [2, R]."""
    R, n = rows.shape
    rows, grad_weights, saved = rows.contiguous(), grad_weights.contiguous(), saved.contiguous()
    grad_scores, grad_budget = torch.empty_like(rows), torch.empty_like(saved[0])
    scale = math.log2(math.e) / eps
    tensors = (grad_weights, rows, saved, grad_scores, grad_budget)
    with torch.cuda.device_of(rows):
        if n > REGISTER_LIMIT:
            exact_backward_parts_kernel[(R,)](*tensors, R, n, scale, 1 / eps, BLOCK=_part(rows), num_warps=8)
        elif R:
            grid, options = _tile(R, n, entries_per_thread=32)
            exact_backward_kernel[grid](*tensors, R, n, scale, 1 / eps, **options)
    return grad_scores, grad_budget


def iterative_forward(
    rows: Tensor, budget: Tensor, eps_steps: tuple[float, ...], last_eps: float
) -> tuple[Tensor, Tensor]:
    """Weights [R, n] in the dtype of `rows` [R, n], and the history of a [n_iters, R] float32; budget [R] float32."""
    R, n = rows.shape
    rows, budget = rows.contiguous(), budget.contiguous()
    weights = torch.empty_like(rows)
    history = torch.empty((len(eps_steps), R), dtype=torch.float32, device=rows.device)
    tensors = (rows, budget, on_device(eps_steps, rows.device), weights, history)
    with torch.cuda.device_of(rows):
        if n > REGISTER_LIMIT:
            iterative_forward_parts_kernel[(R,)](
                *tensors, R, n, len(eps_steps), last_eps, BLOCK=_part(rows), num_warps=8
            )
        elif R:
            few = R <= FEW_ROWS and torch.is_inference_mode_enabled()
            grid, options = _tile(R, n, 16, least_entries=1) if few else _tile(R, n, entries_per_thread=64)
            iterative_forward_kernel[grid](*tensors, R, n, len(eps_steps), last_eps, **options)
    return weights, history


def iterative_backward(
    grad_weights: Tensor, rows: Tensor, budget: Tensor, history: Tensor, eps_steps: tuple[float, ...], last_eps: float
) -> tuple[Tensor, Tensor]:
    """(∂L/∂s [R, n] in the dtype of `rows`, ∂L/∂k [R] float32): the unrolled iteration run backwards.

    grad_weights [R, n]; budget [R] and history [n_iters, R] float32.
    """
    R, n = rows.shape
    rows, grad_weights = rows.contiguous(), grad_weights.contiguous()
    budget, history = budget.contiguous(), history.contiguous()
    grad_scores, grad_budget = torch.empty_like(rows), torch.empty_like(budget)
    tensors = (grad_weights, rows, budget, history, on_device(eps_steps, rows.device), grad_scores, grad_budget)
    with torch.cuda.device_of(rows):
        if n > REGISTER_LIMIT // 2:  # This kernel holds twice as much of a row as the others.
            factors = torch.empty_like(history)
            iterative_backward_parts_kernel[(R,)](
                *tensors, factors, R, n, len(eps_steps), last_eps, BLOCK=_part(rows), num_warps=8
            )
        elif R:
            grid, options = _tile(R, n, entries_per_thread=16)
            iterative_backward_kernel[grid](*tensors, R, n, len(eps_steps), last_eps, **options)
    return grad_scores, grad_budget


def largest_entries(rows: Tensor, count: int) -> Tensor:
    """`ops.largest_entries` of rows [R, n], of at most LONGEST_ROW entries and more than `count`: bool [R, n]."""
    R, n = rows.shape
    rows = rows.contiguous()
    chosen = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    if R:
        grid, options = _tile(R, n, entries_per_thread=32)
        with torch.cuda.device_of(rows):
            largest_entries_kernel[grid](rows, chosen, R, n, count, **options)
    return chosen.view(torch.bool)


def _tile(
    R: int, n: int, entries_per_thread: int, least_entries: int = 512
) -> tuple[tuple[int], dict[str, int | bool]]:
    """The grid, and for a program: rows, entries of a row, whether all of these exist, and warps.

    A program has at least `least_entries`, or 32 rows. With these numbers the kernel spills no registers on sm_90.
    """
    block: int = triton.next_power_of_2(n)
    rows = min(32, max(1, least_entries // block))
    whole = n == block and R % rows == 0
    warps = min(16, max(1, rows * block // (32 * (entries_per_thread if whole else min(entries_per_thread, 32)))))
    return (triton.cdiv(R, rows),), {"ROWS": rows, "BLOCK": block, "WHOLE": whole, "num_warps": warps}


def _part(rows: Tensor) -> int:
    return PART * 4 // rows.element_size()


@functools.lru_cache(maxsize=64)
def on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """The numbers as a tensor, which is kept, so that a forward does not wait for the copy."""
    return torch.tensor(values, dtype=torch.float32, device=device)
