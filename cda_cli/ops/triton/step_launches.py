"""The launches of `step_kernels`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..decoding_step import HeadBudgets, StepHeads
from .step_kernels import add_norm_kernel, draw_kernel, step_heads_kernel

BLOCK_LOGITS = 4096  # of which a program takes so many at a time, in float64


def add_and_norm(
    x: Tensor, branch: Tensor | None, gain: Tensor, bias: Tensor | None, eps: float, centred: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`ops.add_and_norm`."""
    C, x = x.shape[-1], x.contiguous()
    total = x if branch is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    normed = x.new_empty(x.shape, dtype=dtype)
    if x.numel():
        with torch.cuda.device_of(x):
            add_norm_kernel[(x.numel() // C,)](
                x, x if branch is None else branch.contiguous(), gain, gain if bias is None else bias, total, normed,
                eps, C=C, BLOCK_C=triton.next_power_of_2(C), ADDS=branch is not None, CENTRES=centred,
                BIAS=bias is not None, num_warps=min(16, max(1, triton.next_power_of_2(C) // 256)),
            )  # fmt: skip
    return total, normed


def heads_of_step(
    projected: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    heads: int,
    *,
    null_keys: int,
    gains: tuple[Tensor, Tensor] | None,
    eps: float,
    tables: tuple[Tensor, Tensor] | None,
    query_scale: Tensor | None,
    budgets: HeadBudgets | None,
) -> StepHeads:
    """`ops.heads_of_step`."""
    B, G, D = projected.shape
    K = keys.shape[1]
    query = projected.new_empty(B, heads, D)
    budget = None if budgets is None else projected.new_empty(B, heads, dtype=torch.float32)
    unused = query  # a pointer that the kernel does not read
    bias, most = (unused, 1.0) if budgets is None else budgets
    if query.numel():
        with torch.cuda.device_of(projected):
            step_heads_kernel[(B, heads + 2 * K)](
                projected.contiguous(), lengths, *(gains or (unused, unused)), *(tables or (unused, unused)),
                unused if query_scale is None else query_scale, bias, query, keys, values,
                unused if budget is None else budget, eps, most, null_keys,
                *keys.stride()[:3], *values.stride()[:3], H=heads, K=K, G=G, D=D, HALF=(D + 1) // 2,
                BLOCK=triton.next_power_of_2((D + 1) // 2), NORMS=gains is not None, ROTATES=tables is not None,
                SCALES=query_scale is not None, BUDGETS=budgets is not None, num_warps=1,
            )  # fmt: skip
    return StepHeads(query, budget)


def draw_token(logits: Tensor, temperature: Tensor, greedy: Tensor, uniform: Tensor, count: Tensor) -> Tensor:
    """`ops.draw_token`."""
    B, V = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    tokens = count.new_empty(B)
    block = min(BLOCK_LOGITS, triton.next_power_of_2(V))
    with torch.cuda.device_of(logits):
        draw_kernel[(B,)](
            logits, temperature, greedy, uniform.contiguous(), count, tokens, logits.stride(0), V,
            UNIFORMS=uniform.shape[1], BLOCK=block, num_warps=min(8, max(1, block // 256)),
        )  # fmt: skip
    return tokens
