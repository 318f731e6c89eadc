"""Which entries of a row are its largest: the selection of a hard top-k, and of rows that are cut to a few keys."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import can_run_kernels

LONGEST_ROW = 8192  # which a program of the kernel holds in registers


def largest_entries(scores: Tensor, count: int) -> Tensor:
    """Returns True at the `count` largest entries of each row, and at all entries of a row that has no more.

    Which of equal entries are among them is not said; the number is exact. There is no gradient. On a GPU that runs the
    kernels of backend "triton" one of them does it, for rows of up to LONGEST_ROW entries; elsewhere `torch.topk`.

    Args:
        scores: [..., n], float32, bf16, fp16 or float64, without NaN. A subnormal number may count as 0.
        count: at least 1.

    Returns:
        bool, of the shape of `scores`.
    """
    scores = scores.detach()
    if count >= scores.shape[-1]:
        return torch.ones_like(scores, dtype=torch.bool)
    if scores.shape[-1] <= LONGEST_ROW and can_run_kernels("auto", scores.device, scores.dtype, 0):
        return _largest_entries(scores, count)
    kept = scores.topk(count, -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, kept, True)


@torch.library.custom_op("cda::largest_entries", mutates_args=())
def _largest_entries(scores: Tensor, count: int) -> Tensor:
    from .triton import row_launches

    return row_launches.largest_entries(scores.flatten(end_dim=-2), count).view(scores.shape)


@_largest_entries.register_fake
def _(scores: Tensor, count: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)
