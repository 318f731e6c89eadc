"""The shards that FSDP2 leaves in each process, and how they go into a checkpoint and come out of one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from cda_cli.model import Transformer
from cda_cli.storage import Group, StoredTensor, own_rows


def shard_model(
    model: Transformer, device: torch.device, dtype: torch.dtype, ignored: set[nn.Parameter], by_block: bool
) -> nn.Module:
    """Shards the model with FSDP2. One on the device meta gets memory for its shards on `device`, without values.

    With `by_block` (one batch a step in each process) each block is gathered while the one before it is computed. The
    parameters of blocks are gathered in the dtype of the matrix products, and gradients are summed in float32. The
    residual stream, the embeddings and the logits keep the dtypes that autocast gives them, as in one process.

    With more batches a step the accumulated gradients are full tensors, and so are the weights from the first batch to
    the last. All parameters are then one group, in float32, for autocast as in one process.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.each_block() if by_block else []:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=ignored)
        register_fsdp_forward_method(block, "step")  # Otherwise a step of decoding would meet shards.
    # Without resharding, the model's parameters would not be its shards after a forward pass without a backward pass.
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    if any(parameter.is_meta for parameter in model.parameters()):
        model.to_empty(device=device)
        model.fill_buffers()
    return model


def own_shards(tensors: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """Returns the rows that this process of `group` writes into a checkpoint: its shard, or as many of a whole tensor.

    The first alone writes the tensors without dimensions. A single process writes all.
    """
    if group.count == 1:
        return dict(tensors)
    own = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            own[name] = tensor.to_local()
        elif tensor.ndim:
            own[name] = tensor[own_rows(len(tensor), group.rank, group.count)]
        elif group.rank == 0:
            own[name] = tensor
    return own


def shard_like(tensor: Tensor | StoredTensor, parameter: Tensor) -> Tensor:
    """Returns this process's shard of a full `tensor` that belongs to `parameter`; all of it if that is not sharded.

    Of a tensor that is not read yet, it reads no more than that.
    """
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor.read() if isinstance(tensor, StoredTensor) else tensor
    mesh = parameter.device_mesh
    rows = own_rows(parameter.shape[0], mesh.get_local_rank(), mesh.size())
    local = tensor.read(rows.start, rows.stop) if isinstance(tensor, StoredTensor) else tensor[rows].clone()
    return DTensor.from_local(
        local.to(parameter.device),
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@torch.no_grad()
def load_shards(into: Mapping[str, Tensor], tensors: Mapping[str, Tensor | StoredTensor]) -> None:
    """Copies to each of `into` its shard (see `shard_like`) of the tensor of that name, if there is one."""
    for name, here in into.items():
        if name in tensors:
            here.copy_(shard_like(tensors[name], here))
