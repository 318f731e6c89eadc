"""Projects queries, keys, values, and a few further numbers of every head, by one matrix product.

The further numbers (the logits of a learned k and of an output gate) have linears of their own, with H outputs each.
A GPU takes as long for a product with so few columns as for one with many. In compiled code these columns are
therefore packed behind those of queries, keys and values, and padded with zeros to a multiple of the head width.

Shapes: B batch, T queries, C width of the residual stream, H query heads, K key heads, G = H + 2·K and the heads that
hold packed columns, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def project_heads(x_BTC: Tensor, to_qkv: nn.Linear, head_linears: Mapping[str, nn.Linear], head_width: int) -> Tensor:
    """Returns the heads [B, T, G, D]: H of queries, K each of keys and values, and in compiled code packed columns."""
    weight: Tensor = to_qkv.weight
    bias: Tensor | None = to_qkv.bias
    if head_linears and torch.compiler.is_compiling():
        weight = torch.cat((weight, *(linear.weight for linear in head_linears.values())))
        weight = F.pad(weight, (0, 0, 0, -len(weight) % head_width))
        bias = F.pad(bias, (0, len(weight) - len(bias))) if bias is not None else None
    return F.linear(x_BTC, weight, bias).unflatten(-1, (-1, head_width))


def head_logits(x_BTC: Tensor, packed_BTGD: Tensor, head_linears: Mapping[str, nn.Linear]) -> dict[str, Tensor]:
    """Returns the outputs [B, H, T] of `head_linears`, by their names.

    `packed_BTGD` are the heads that `project_heads` returned behind the values. There are none if it packed nothing.
    """
    logits: dict[str, Tensor] = {}
    first = 0
    for name, linear in head_linears.items():
        H = linear.out_features
        if packed_BTGD.shape[2]:
            outputs_BTH = packed_BTGD.flatten(2)[..., first : first + H] + linear.bias
        else:
            outputs_BTH = linear(x_BTC)
        logits[name] = outputs_BTH.transpose(1, 2)
        first += H
    return logits
