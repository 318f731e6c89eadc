"""What PyTorch does to a function besides one backward: torch.func, forward mode, gradients of gradients, tracing.

The custom operators have a formula for one backward only. Where more is asked, doors and backwards compute with
PyTorch's own operators instead, from the same solution of the rows, and PyTorch differentiates these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

# The tensors that hold their numbers themselves. Those of another class may have none.
PLAIN = (Tensor, nn.Parameter)


def transformed() -> bool:
    """Whether a torch.func transform, or forward mode, sees the tensors of this call.

    Both questions are PyTorch's own, and neither has a public form that a graph of torch.compile can hold.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def observed(*tensors: Tensor) -> bool:
    """Whether more than autograd looks at this call: the compiler, a tracer, a dispatch mode, a subclass of tensors.

    It then needs the registered operator. Elsewhere the registration only costs the host, more than all else in a call.
    The count of modes has no public form.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    for tensor in tensors:  # noqa: SIM110 - each call of the operator asks, and `any` would cost it more
        if type(tensor) not in PLAIN:
            return True
    return False


def only_values(*tensors: Tensor) -> bool:
    """Whether nothing is asked of this call but its values: no gradient, and nothing of what `observed` looks for.

    It then does without the registered operator. In a process that has compiled nothing, the first call of one would
    import the compiler, which takes as long as the rest of torch.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return not observed(*tensors)


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
