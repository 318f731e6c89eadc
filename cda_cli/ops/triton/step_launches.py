"""The launches of `step_kernels` and of `routed_blocks`."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..decoding_step import HeadBudgets, StepHeads
from .routed_blocks import routed_sum_kernel, routed_units_kernel
from .step_kernels import add_norm_kernel, draw_kernel, step_heads_kernel

BLOCK_LOGITS = 4096  # of which a program takes so many at a time, in float64
# Weights of a tile of routed blocks: 32 for each of 128 threads.
ROUTED_TILE = 4096
FEW_ROWS = 16  # One kernel serves up to so many.


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


def routed_blocks(
    x: Tensor,
    factors: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    tolerance: float,
    dtype: torch.dtype,
    read: Tensor | None,
) -> Tensor:
    """`ops.routed_blocks`."""
    (B, C), N, F = x.shape, factors.shape[1], up.shape[0]
    size, unused = F // N, x  # a pointer that a kernel does not read
    factors, output = factors.contiguous(), x.new_empty(B, C, dtype=dtype)
    if not B:
        return output
    units = x.new_empty(B, F, dtype=torch.float32)
    least = torch.tensor(tolerance).to(factors.dtype).item()
    side = min(ROUTED_TILE, triton.next_power_of_2(C))
    some = min(ROUTED_TILE // side, triton.next_power_of_2(size))
    parts, shape = triton.cdiv(size, some), {"C": C, "N": N, "SIZE": size}
    with torch.cuda.device_of(x):
        routed_units_kernel[(N * parts, B)](
            x.contiguous(), factors, up.contiguous(), unused if up_bias is None else up_bias, units,
            unused if read is None else read, least, B, **shape, PARTS=parts, BLOCK_U=some, BLOCK_C=side,
            ROWS=max(FEW_ROWS, triton.next_power_of_2(B)), BIAS=up_bias is not None, COUNTS=read is not None,
        )  # fmt: skip
        padded = triton.next_power_of_2(size)
        blocks = min(max(1, ROUTED_TILE // (2 * padded)), triton.next_power_of_2(N))
        some = min(max(1, ROUTED_TILE // (blocks * padded)), triton.next_power_of_2(C))
        routed_sum_kernel[(triton.cdiv(C, some), B)](
            units, factors, down.contiguous(), unused if down_bias is None else down_bias, output, least, **shape,
            BLOCK_C=some, BLOCK_N=blocks, BLOCK_S=padded, BIAS=down_bias is not None,
        )  # fmt: skip
    return output
