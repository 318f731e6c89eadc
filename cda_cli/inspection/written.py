"""What a head adds to the residual stream: vectors that its keys move there, not weights.

A weight says little where values differ in length: a sink often has a large weight and a short value (Kobayashi et al.,
arXiv 2004.10102).

Shapes: B batch, H heads, t queries of a block, S keys, D head width, C width of the residual stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cda_cli.inspection.seen_rows import SeenRows


def moved_norm(rows: SeenRows) -> Tensor:
    """Σ_s ‖λ_s v_s W_O‖, [B, H, t]: the length of all that the keys of a row move, before directions cancel.

    NaN where W_O is not known.
    """
    if rows.seen.to_out is None:
        return torch.full_like(rows.k, torch.nan)
    values = rows.seen.values.float()
    lengths = _length(values, rows)
    return rows.seen.output_scale.double() * (rows.weights.float() @ lengths.unsqueeze(-1)).squeeze(-1)


def written_norm(rows: SeenRows) -> Tensor:
    """‖Σ_s λ_s v_s W_O‖, [B, H, t]: the length of what a head adds to the residual stream of a query.

    NaN where W_O is not known.
    """
    if rows.seen.to_out is None:
        return torch.full_like(rows.k, torch.nan)
    return rows.seen.output_scale.double() * _length(rows.weights.float() @ rows.seen.values.float(), rows)


def _length(vectors: Tensor, rows: SeenRows) -> Tensor:
    """Returns ‖x W_O‖ of vectors x [B, H, N, D] of the heads, [B, H, N], without the products x W_O themselves."""
    H, D = vectors.shape[1], vectors.shape[-1]
    assert rows.seen.to_out is not None
    of_head = rows.seen.to_out.float().unflatten(1, (H, D))
    gram = torch.einsum("chd,che->hde", of_head, of_head)
    return ((vectors @ gram) * vectors).sum(-1).clamp(min=0).sqrt()
