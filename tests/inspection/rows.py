"""Rows of weights as an observer would see them."""

from __future__ import annotations

import torch
from torch import Tensor

from cda_cli.inspection.measures import MEASURES
from cda_cli.inspection.seen_rows import SeenRows
from cda_cli.model.observe import ObservedAttention

DIM, WIDTH = 5, 3


def seen_rows(
    weights: Tensor,
    k: Tensor | float = 1.0,
    null: int = 0,
    tokens: Tensor | None = None,
    position: int = 0,
    visible: Tensor | None = None,
) -> SeenRows:
    """Makes rows of weights [B, H, t, S], or [t, S] of one head. All values of a key are its number, counted from 1."""
    weights = weights.reshape((1,) * (4 - weights.ndim) + tuple(weights.shape))
    B, H, t, S = weights.shape
    budget = k.expand(B, H, t) if isinstance(k, Tensor) else torch.full((B, H, t), k)
    values = torch.arange(1.0, S + 1).view(S, 1).expand(B, H, S, DIM)
    to_out = torch.eye(WIDTH, H * DIM)
    seen = ObservedAttention(0, weights, budget, null, position, values, to_out, torch.ones(B, H, t), visible=visible)
    keys = torch.arange(S - null).expand(B, -1) if tokens is None else tokens
    return SeenRows(seen, keys)


def random_weights(B: int, H: int, T: int, null: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns causal weights, of which some are capped, tiny or 0, and a k for each row, which may exceed its keys."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(B, H, T, null + T, generator=generator)
    kinds = torch.randint(4, weights.shape, generator=generator)
    weights = torch.where(kinds == 0, 1.0, torch.where(kinds == 1, weights * 1e-3, weights))
    weights = torch.where(kinds == 3, 0.0, weights).tril(null)
    return weights, 0.5 + 4 * torch.rand(B, H, T, generator=generator)


def uniform(T: int, null: int = 0) -> Tensor:
    """Rows [T, S] that read all they see alike."""
    weights = torch.ones(T, null + T).tril(null)
    return weights / weights.sum(-1, keepdim=True)


def shifted(T: int, back: int) -> Tensor:
    """Rows [T, T] that read only the key `back` before them, or the first."""
    return torch.eye(T)[(torch.arange(T) - back).clamp(min=0)]


def figures(rows: SeenRows, name: str) -> list[float]:
    """The figure of each row of the first head of the first sequence."""
    return MEASURES[name](rows)[0, 0].tolist()
