"""How far the heads of a layer read different keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cda_cli.inspection.seen_rows import SeenRows


def divergence(rows: SeenRows) -> Tensor:
    """KL(p_h ‖ p̄) in bits, [B, H, t], p̄ the mean of p over the heads: how far a head is from what its layer reads.

    Its mean over the heads is their Jensen–Shannon divergence, H(p̄) − mean H(p_h) (as in Correia et al., arXiv
    1909.00015): 0 where all heads read alike, log₂ of their number where no key is read by two of them.
    """
    mean = rows.share.mean(1)
    surprise = mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
    crossed = -torch.einsum("bhts,bts->bht", rows.share, surprise).double()
    return (crossed - rows.entropy).clamp(min=0) / math.log(2)
