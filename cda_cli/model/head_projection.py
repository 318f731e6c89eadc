"""Projects queries, keys, values, and a few further numbers of every head, by one matrix product.

The further numbers (such as the logits of a learned k and of an output gate) have linears of their own, with H outputs
each, or fewer where they are of some heads only.
A GPU takes as long for a product with so few columns as for one with many. In compiled code, and in a model that is
copied for decoding, these columns are therefore packed behind those of queries, keys and values, and padded with zeros
to a multiple of the head width.

Shapes: B batch, T queries, C width of the residual stream, H query heads, K key heads, G = H + 2·K and the heads that
hold packed columns, D head width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedProjection(nn.Linear):
    """A linear for queries, keys and values that also has the columns of further numbers, packed once."""

    def __init__(self, to_qkv: nn.Linear, head_linears: Mapping[str, nn.Linear], head_width: int) -> None:
        weight, bias = _packed(to_qkv, head_linears, head_width)
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)


def project_heads(x_BTC: Tensor, to_qkv: nn.Linear, head_linears: Mapping[str, nn.Linear], head_width: int) -> Tensor:
    """Returns the heads [B, T, G, D]: H of queries, K each of keys and values, and columns that are packed."""
    weight: Tensor = to_qkv.weight
    bias: Tensor | None = to_qkv.bias
    if head_linears and torch.compiler.is_compiling() and not isinstance(to_qkv, PackedProjection):
        weight, bias = _packed(to_qkv, head_linears, head_width)
    return F.linear(x_BTC, weight, bias).unflatten(-1, (-1, head_width))


def _packed(to_qkv: nn.Linear, head_linears: Mapping[str, nn.Linear], head_width: int) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of `to_qkv` with those columns behind, whose own bias is not in it."""
    weight = torch.cat((to_qkv.weight, *(linear.weight for linear in head_linears.values())))
    weight = F.pad(weight, (0, 0, 0, -len(weight) % head_width))
    bias: Tensor | None = to_qkv.bias
    return weight, F.pad(bias, (0, len(weight) - len(bias))) if bias is not None else None


def head_logits(x_BTC: Tensor, packed_BTGD: Tensor, head_linears: Mapping[str, nn.Linear], name: str) -> Tensor:
    """Returns the output [B, H, T] of one of `head_linears`, or of fewer heads.

    `packed_BTGD` are the heads that `project_heads` returned behind the values. There are none if it packed nothing.
    """
    linear = head_linears[name]
    if not packed_BTGD.shape[2]:
        outputs_BTH = linear(x_BTC)
    else:
        names = list(head_linears)
        first = sum(head_linears[other].out_features for other in names[: names.index(name)])
        outputs_BTH = packed_BTGD.flatten(2)[..., first : first + linear.out_features] + linear.bias
    return outputs_BTH.transpose(1, 2)
