"""What PyTorch does to a function besides one backward: torch.func, forward mode, gradients of gradients.

The custom operators have a formula for one backward only. Where more is asked, doors and backwards compute with
PyTorch's own operators instead, from the same solution of the rows, and PyTorch differentiates these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a torch.func transform, or forward mode, sees the tensors of this call.

    Both questions are PyTorch's own, and neither has a public form that a graph of torch.compile can hold.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiated_again() -> bool:
    """Within a backward: whether its gradients must have gradients of their own, or are computed for a transform."""
    return torch.is_grad_enabled() or transformed()


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needed: Sequence[bool], grad_output: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of `function(*inputs)` for each input that is `needed`; they are differentiable themselves."""
    with torch.enable_grad():
        inputs = [tensor.view_as(tensor) for tensor in inputs]  # separate tensors, also where one is given twice
        output = function(*inputs)
    wanted = [tensor for tensor, is_needed in zip(inputs, needed, strict=True) if is_needed]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=True, materialize_grads=True))
    return tuple(next(grads) if is_needed else None for is_needed in needed)
