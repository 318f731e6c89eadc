"""The published operator, `colt5_attention`, behind our signature: the yardstick of parity tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from cda_cli.ops.transforms import transformed


def published_soft_topk(
    scores: Tensor, budget: Tensor, *, eps: float, mask: Tensor | None, n_iters: int, eps_init: float, eps_decay: float
) -> Tensor:
    """`coor_descent` on a CPU, `triton_coor_descent` on CUDA; float32 inside, differentiable by autograd.

    scores [..., n]; budget [...], the k of each row; mask [..., n] True = visible. Raises, in one sentence, ImportError
    where the package or, for CUDA tensors, its Triton module cannot be imported, and ValueError within a transform.
    """
    if transformed():
        raise ValueError(
            "backend 'colt5' is not made for forward mode or the transforms of torch.func; choose backend 'torch'"
        )
    rows = scores.float()
    if (rows == -torch.inf).any():  # counts as masked, as for our own backend
        mask = (rows != -torch.inf) if mask is None else mask & (rows != -torch.inf)
    arguments = {"n_iters": n_iters, "eps": eps, "eps_init": eps_init, "eps_decay": eps_decay, "mask": mask}
    if not scores.is_cuda:
        from colt5_attention.coor_descent import coor_descent

        return coor_descent(rows, k=budget.float(), **arguments).to(scores.dtype)
    try:
        from colt5_attention.triton_coor_descent import triton_coor_descent
    except (ImportError, SystemExit) as error:  # some of its releases call exit() where Triton is missing
        raise ImportError(
            "backend 'colt5' needs Triton on a GPU; pip install triton, or use backend 'torch'"
        ) from error
    segments = max(1, n_iters // 5)  # as the published model calls it
    if mask is not None:
        arguments["mask"] = mask.expand(scores.shape)
    weights = triton_coor_descent(rows, k=budget.float().flatten(), checkpoint_segments=segments, **arguments)
    return weights.to(scores.dtype)
