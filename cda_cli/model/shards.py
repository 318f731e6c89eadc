"""Tensors of which FSDP leaves a shard in each process."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Gathers a sharded tensor, in every process; returns any other as it is."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)  # Its class is slow to import.
    return tensor if gather is None else gather()
