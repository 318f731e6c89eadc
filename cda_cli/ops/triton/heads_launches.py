"""Norm and rotation of queries and keys: the launches of `heads_kernels`, and their gradient.

PyTorch's own operators, compiled, would read all heads once more for the gradient of the gains, and would copy the
gradient of the values.

Shapes: B batch, T positions, H query heads, K key heads, G heads of a projection, D head width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..heads import Heads
from ..transforms import differentiated_again, gradients
from .heads_kernels import backward_kernel, forward_kernel

ROWS = 32


def norm_and_rotate(
    projected: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    key_heads: int,
    eps: float,
) -> Heads:
    """`ops.norm_and_rotate`."""
    tensors = (projected.contiguous(), query_gain, key_gain, cos, sin)
    return Heads(*_NormAndRotate.apply(*tensors, heads, key_heads, eps))  # type: ignore[no-untyped-call]


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        query_gain: Tensor,
        key_gain: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        key_heads: int,
        eps: float,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(projected, query_gain, key_gain, cos, sin)
        ctx.settings = heads, key_heads, eps
        query, key = heads_forward(projected, query_gain, key_gain, cos, sin, heads, key_heads, eps)
        others = projected[:, :, heads + key_heads :]
        return query, key, others[:, :, :key_heads], others[:, :, key_heads:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, cos, sin = ctx.saved_tensors
        if differentiated_again():
            again = gradients(
                lambda *given: _in_plain_pytorch(given, cos, sin, *ctx.settings),
                inputs,
                ctx.needs_input_grad[:3],
                torch.cat(grads, 2),
            )
            return (*again, None, None, None, None, None)
        projected, gain_parts = heads_backward(*grads, *inputs, cos, sin, ctx.settings[2])
        query_gain, key_gain = gain_parts.sum(1)
        return projected, query_gain, key_gain, None, None, None, None, None


def _in_plain_pytorch(
    inputs: tuple[Tensor, ...], cos: Tensor, sin: Tensor, heads: int, key_heads: int, eps: float
) -> Tensor:
    """All heads that `norm_and_rotate` gives, [B, T, G, D], by PyTorch's own operators, which it can differentiate."""
    projected, query_gain, key_gain = inputs
    T, D = projected.shape[1], projected.shape[3]
    gains = torch.cat((query_gain.expand(heads, -1), key_gain.expand(key_heads, -1)))
    heads_in = projected[:, :, : heads + key_heads].float()
    normed = heads_in * (heads_in.square().mean(-1, keepdim=True) + eps).rsqrt() * gains
    partner = normed.unflatten(-1, (2, D // 2)).flip(-2).flatten(-2)
    turned = normed * cos[:T, None] + partner * sin[:T, None]
    return torch.cat((turned.to(projected.dtype), projected[:, :, heads + key_heads :]), 2)


@torch.library.custom_op("cda::heads_forward", mutates_args=())
def heads_forward(
    projected: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    key_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """query [B, T, H, D] and key [B, T, K, D], as `norm_and_rotate` gives them; `projected` is contiguous."""
    B, T, G, D = projected.shape
    query, key = _queries_and_keys(projected, heads, key_heads)
    if query.numel():
        with torch.cuda.device_of(projected):
            forward_kernel[(triton.cdiv(B * T, ROWS), 2)](
                projected, query_gain, key_gain, cos, sin, query, key, eps, T, B * T,
                H=heads, K=key_heads, G=G, D=D, HALF=triton.next_power_of_2(D // 2), ROWS=ROWS,
            )  # fmt: skip
    return query, key


def _queries_and_keys(projected: Tensor, heads: int, key_heads: int) -> tuple[Tensor, Tensor]:
    B, T, _, D = projected.shape
    return projected.new_empty(B, T, heads, D), projected.new_empty(B, T, key_heads, D)


@heads_forward.register_fake
def _(
    projected: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    key_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return _queries_and_keys(projected, heads, key_heads)


@torch.library.custom_op("cda::heads_backward", mutates_args=())
def heads_backward(
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    grad_rest: Tensor,
    projected: Tensor,
    query_gain: Tensor,
    key_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The gradient of `projected` [B, T, G, D], and parts of the gradients of both gains, [2, blocks of rows, D]
    float32."""
    B, T, G, D = projected.shape
    H, K = grad_query.shape[2], grad_key.shape[2]
    grad_projected, gain_parts = _gradients(projected)
    incoming = (grad_query, grad_key, grad_value, grad_rest)
    grads = [grad if grad.stride(-1) == 1 else grad.contiguous() for grad in incoming]
    if grad_query.numel():
        with torch.cuda.device_of(projected):
            backward_kernel[(gain_parts.shape[1], 4 if H + 2 * K < G else 3)](
                *grads, projected, query_gain, key_gain, cos, sin, grad_projected, gain_parts, eps,
                *(stride for grad in grads for stride in grad.stride()[:3]), T, B * T,
                H=H, K=K, G=G, D=D, HALF=triton.next_power_of_2(D // 2), ROWS=ROWS,
            )  # fmt: skip
    return grad_projected, gain_parts


def _gradients(projected: Tensor) -> tuple[Tensor, Tensor]:
    B, T, _, D = projected.shape
    parts = projected.new_empty(2, (B * T + ROWS - 1) // ROWS, D, dtype=torch.float32)
    return projected.new_empty(projected.shape), parts


@heads_backward.register_fake
def _(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, grad_rest: Tensor, projected: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return _gradients(projected)
