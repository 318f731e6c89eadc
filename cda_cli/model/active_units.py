"""The feed-forward of a single token on a CPU, which reads the weights of those units alone that are not 0.

A step of decoding waits for its weights to come from memory, so those that are multiplied by 0 are not read. That is
the down projection of all other units, and where a gate or a router chooses them, also their up projection. Deja Vu
(arXiv 2310.17157) and PowerInfer (2312.12456) predict the units; here they are known, so the result is that of the
whole layer, but for the order of a sum.

Shapes: T positions, C width of the residual stream, F units, G factors of a gate, each of F/G neighbouring units,
U units that are not 0.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cda_cli.model.activations import Gated
from cda_cli.model.feed_forward import FeedForward
from cda_cli.model.transformer import Transformer

MOST_ACTIVE = 1 / 4  # If a larger share of the units is not 0 on a token, the layer reads all of them.


class ActiveUnits(nn.Module):
    """Computes what `layer` does, with its weights. A copy of the down projection has the weights of a unit in a row.

    `steps` counts the single tokens, and `rows_read` the rows of C weights that were read for them, of the
    `Activation.total_width` of the layer.
    """

    def __init__(self, layer: FeedForward) -> None:
        super().__init__()
        self.layer = layer
        self.steps = self.rows_read = 0

    @functools.cached_property
    def _down_FC(self) -> Tensor:
        return self.layer.proj_out.weight.detach().t().contiguous()

    def forward(self, x_BTC: Tensor) -> Tensor:
        if x_BTC.shape[:2] != (1, 1):
            return cast(Tensor, self.layer(x_BTC))
        layer, activation = self.layer, self.layer.activation
        self.steps += 1
        gate: Tensor | None = None
        if layer.proj_gate is not None:
            assert isinstance(activation, Gated)
            gate = layer.proj_gate(x_BTC)
            factors_G = activation.factors(gate).flatten()
            self.rows_read += len(factors_G)
            chosen = factors_G.nonzero().flatten()
            if len(chosen) <= MOST_ACTIVE * len(factors_G):
                return self._by_gate(x_BTC, activation, factors_G, chosen)
        activations_F = activation(layer.proj_in(x_BTC), gate).flatten()
        self.rows_read += len(activations_F)
        active_U = activations_F.nonzero().flatten()
        if len(active_U) <= MOST_ACTIVE * len(activations_F):
            return self._down(active_U, activations_F.index_select(0, active_U))
        self.rows_read += len(activations_F)
        return cast(Tensor, layer.proj_out(activations_F.view(1, 1, -1)))

    def _by_gate(self, x_11C: Tensor, activation: Gated, factors_G: Tensor, chosen: Tensor) -> Tensor:
        """Computes the layer from the units of the factors `chosen`."""
        up, size = self.layer.proj_in, self.layer.proj_in.out_features // len(factors_G)
        units = (size * chosen.unsqueeze(1) + torch.arange(size)).flatten()
        self.rows_read += len(units)
        bias = up.bias.index_select(0, units) if up.bias is not None else None
        values = activation.values(F.linear(x_11C, up.weight.index_select(0, units), bias)).flatten()
        activations = factors_G.index_select(0, chosen).to(values.dtype).repeat_interleave(size) * values
        nonzero = activations.nonzero().flatten()
        return self._down(units.index_select(0, nonzero), activations.index_select(0, nonzero))

    def _down(self, units_U: Tensor, activations_U: Tensor) -> Tensor:
        """Returns the sum [1, 1, C] of the rows of units, times their activations, plus the bias.

        Each thread adds some of the rows: `embedding_bag` shares out whole bags alone.
        """
        rows, bias = self._down_FC, self.layer.proj_out.bias
        self.rows_read += len(units_U)
        in_bag = max(1, math.ceil(len(units_U) / torch.get_num_threads()))
        bags = torch.arange(0, max(1, len(units_U)), in_bag)
        scaled = activations_U.to(rows.dtype)
        total = F.embedding_bag(units_U, rows, bags, mode="sum", per_sample_weights=scaled).sum(0)
        return (total if bias is None else total + bias).view(1, 1, -1)


def reading_active_units(model: Transformer) -> Transformer:
    """Returns a model that shares all but its feed-forward with `model`; that is `ActiveUnits`, on its weights.

    It is for passes without a gradient on a CPU, with one row that has one token, and for activations of which many are
    0 (`Activation.has_zeros`).
    """
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    for block in copied.each_block():
        block.feed_forward = ActiveUnits(block.feed_forward)  # type: ignore[assignment]
    return copied


def weights_read(model: Transformer) -> float | None:
    """The share of the weights of the feed-forward that was read for single tokens, or None if no layer counts it."""
    layers = [each for each in model.modules() if isinstance(each, ActiveUnits)]
    rows = sum(each.steps * each.layer.activation.total_width for each in layers)
    return sum(each.rows_read for each in layers) / rows if rows else None
