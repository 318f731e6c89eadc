"""Context parallelism: the processes of a group compute a part of each sequence each.

A sequence is cut into 2·n equal chunks, for n processes, of which process i has chunks i and 2·n − 1 − i. A query late
in a sequence sees more keys than an early one, so these two make the same work for each. Queries stay where they are,
and keys and values of a layer are gathered.

Source: Llama 3 (arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_GROUPS: dict[str, ProcessGroup] = {}  # by name, as a custom operator takes no group


class ContextPart:
    """The part of each sequence that this process of a `group` computes, on `device`."""

    def __init__(self, group: ProcessGroup, device: torch.device) -> None:
        self.index, self.count, self.device, self._name = group.rank(), group.size(), device, group.group_name
        _GROUPS[self._name] = group

    @property
    def chunks(self) -> tuple[int, int]:
        """The indices of the two chunks of this process, of the 2·n of a sequence."""
        return self.index, 2 * self.count - 1 - self.index

    def own(self, x: Tensor, dim: int) -> Tensor:
        """Returns this process's positions of `x`, which has whole sequences along `dim`: its two chunks, in order."""
        length = x.shape[dim] // (2 * self.count)
        return torch.cat([x.narrow(dim, chunk * length, length) for chunk in self.chunks], dim)

    def positions(self, own: int) -> Tensor:
        """Returns the positions in their sequence of the `own` positions that this process has, int64 [own]."""
        return self.own(torch.arange(own * self.count, device=self.device), 0)

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """Returns whole sequences along `dim`, in every process, from the own positions of each. They have no padding.

        The gradients of all processes are summed in float32, in the order of the processes.
        """
        gathered: Tensor = gather_positions(x, dim, self._name)
        return gathered

    def halves(self, own: int, earlier: int = 0) -> list[tuple[slice, int]]:
        """Returns each chunk's place among the `own` positions, and where the keys end that its last query sees.

        The keys of a sequence come behind `earlier` others.
        """
        length, (head, tail) = own // 2, self.chunks
        return [
            (slice(0, length), earlier + (head + 1) * length),
            (slice(length, own), earlier + (tail + 1) * length),
        ]


@torch.library.custom_op("cda::gather_positions", mutates_args=())
def gather_positions(x: Tensor, dim: int, group: str) -> Tensor:
    """The whole sequences of a group, contiguous, from each process's two chunks along `dim` (see `ContextPart`)."""
    import torch.distributed as dist

    processes = _GROUPS[group]
    pieces = x.new_empty(processes.size() * x.numel())
    # PyTorch 2.13 renamed the function.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(pieces, x.contiguous().flatten(), group=processes)
    halves = pieces.view(-1, *x.shape).unflatten(dim + 1, (2, -1))
    heads, tails = halves.unbind(dim + 1)
    return torch.cat((heads, tails.flip(0))).movedim(0, dim).flatten(dim, dim + 1).contiguous()


@torch.library.custom_op("cda::scatter_positions", mutates_args=())
def scatter_positions(x: Tensor, dim: int, group: str) -> Tensor:
    """The sum of all processes' `x` at the positions of this one: the gradient of `gather_positions`.

    NCCL adds in bf16, from process to process. Here each process adds up what it gets from all.
    """
    import torch.distributed as dist

    processes = _GROUPS[group]
    count = processes.size()
    heads, tails = x.unflatten(dim, (2 * count, -1)).movedim(dim, 0).chunk(2)
    sent = torch.stack((heads, tails.flip(0)), dim + 1).contiguous()  # [processes, …, 2, chunk, …]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received.view(-1), sent.view(-1), group=processes)
    return received.sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype).flatten(dim, dim + 1)


@gather_positions.register_fake
def _(x: Tensor, dim: int, group: str) -> Tensor:
    return x.new_empty([size * _GROUPS[group].size() if axis == dim else size for axis, size in enumerate(x.shape)])


@scatter_positions.register_fake
def _(x: Tensor, dim: int, group: str) -> Tensor:
    return x.new_empty([size // _GROUPS[group].size() if axis == dim else size for axis, size in enumerate(x.shape)])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.dim, ctx.group = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return scatter_positions(grad, ctx.dim, ctx.group), None, None


gather_positions.register_autograd(_backward, setup_context=_save)
