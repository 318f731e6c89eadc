"""Measures of a row's budget k: how much of it sits in capped keys, and whether the rule binds at all."""

from __future__ import annotations

import torch
from torch import Tensor

from cda_cli.inspection.seen_rows import SeenRows


def sparsity_k(rows: SeenRows) -> Tensor:
    """The budget k of each row, [B, H, t]."""
    return rows.k


def row_sum(rows: SeenRows) -> Tensor:
    """Σλ, [B, H, t]."""
    return rows.row_sum


def row_sum_error(rows: SeenRows) -> Tensor:
    """|Σλ − min(k, visible keys)|, [B, H, t]: what the solver misses the constraint by (docs/operator.md)."""
    return (rows.row_sum - torch.minimum(rows.k, rows.real_keys + rows.seen.null_keys)).abs()


def capped_share(rows: SeenRows) -> Tensor:
    """m/k: the part of the budget in the m capped keys, [B, H, t]; NaN for rows that see no more than k keys."""
    return rows.of_bounded(rows.capped / rows.k)


def gate_equivalent(rows: SeenRows) -> Tensor:
    """1 where no key is capped (m = 0), else 0, [B, H, t]; NaN for rows that see no more than k keys.

    Without a capped key λ = k · softmax(s/ε) exactly (docs/operator.md, section 2): the budget is a gate on a softmax.
    """
    return rows.of_bounded((rows.capped == 0).double())
