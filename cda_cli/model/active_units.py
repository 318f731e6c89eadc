"""The feed-forward of few tokens, which reads the weights of those units alone that are not 0.

A step of decoding waits for its weights to come from memory, so those that are multiplied by 0 are not read. On a CPU,
that is for a single token the down projection of all other units, and where a gate or a router chooses them, also their
up projection. By kernels it is both projections of the blocks of units that the router of a row leaves out. Deja Vu
(arXiv 2310.17157) and PowerInfer (2312.12456) predict the units; here they are known, so the result is that of the
whole layer, but for the order of a sum.

Shapes: B rows, T positions, C width of the residual stream, F units, G factors of a gate, each of F/G neighbouring
units, U units that are not 0.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cda_cli.model.activations import Gated, RoutedBlocks
from cda_cli.model.feed_forward import FeedForward
from cda_cli.model.transformer import Transformer
from cda_cli.ops import can_run_kernels, routed_blocks

MOST_ROWS = 16  # With more rows, each block is one of some row, and the matrix units take the whole layer.
MOST_ACTIVE = 1 / 4  # If a larger share of the units is not 0 on a token, the layer reads all of them.


class ActiveUnits(nn.Module):
    """Computes what `layer` does, with its weights. A copy of the down projection has the weights of a unit in a row.

    `steps` counts the single tokens, and `rows_read` the rows of C weights that were read for them, of the
    `Activation.total_width` of the layer: it is for a CPU.
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
        factors = layer.factors(x_BTC)
        if factors is not None:
            assert isinstance(activation, Gated)
            factors_G = factors.flatten()
            self.rows_read += len(factors_G)
            chosen = factors_G.nonzero().flatten()
            if len(chosen) <= MOST_ACTIVE * len(factors_G):
                return self._by_gate(x_BTC, activation, factors_G, chosen)
        activations_F = activation(layer.proj_in(x_BTC), factors).flatten()
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


class ActiveBlocks(nn.Module):
    """Computes what `layer`, whose activation is `RoutedBlocks`, does, with its weights: for few rows by kernels.

    What it counts is on the device, since a CUDA graph can hold a step.
    """

    def __init__(self, layer: FeedForward) -> None:
        super().__init__()
        self.layer = layer
        self._blocks = torch.zeros(2, dtype=torch.int64, device=layer.proj_in.weight.device)  # read, and of so many

    def forward(self, x_BTC: Tensor) -> Tensor:
        layer, activation = self.layer, self.layer.activation
        if x_BTC.shape[1] != 1 or len(x_BTC) > MOST_ROWS:
            return cast(Tensor, layer(x_BTC))
        assert isinstance(activation, RoutedBlocks)
        assert layer.proj_gate is not None
        gate_B1G = layer.proj_gate(x_BTC)
        up, down = layer.proj_in, layer.proj_out
        out_BC = routed_blocks(
            x_BTC.squeeze(1), activation.weights(gate_B1G).squeeze(1), up.weight, up.bias, down.weight, down.bias,
            tolerance=activation.tolerance, dtype=gate_B1G.dtype, read=self._blocks,
        )  # fmt: skip
        return out_BC.unsqueeze(1)

    @property
    def steps(self) -> int:
        """The steps so far of at most MOST_ROWS rows."""
        return int(self._blocks[1]) // self.layer.activation.gate_width

    @property
    def rows_read(self) -> int:
        """Rows of C weights that these steps read: the router, and both projections of each block of any row."""
        activation = self.layer.activation
        assert activation.block_size is not None
        return self.steps * activation.gate_width + 2 * activation.block_size * int(self._blocks[0])


def reading_active_units(model: Transformer, rows: int = 1) -> Transformer:
    """Returns a model for steps of `rows` rows that shares all but its feed-forward with `model`, or `model` itself.

    The feed-forward is `ActiveBlocks` where a router chooses blocks, there are few rows, and backend "triton" is asked
    for; and `ActiveUnits` for a single row on a CPU, for activations of which many are 0 (`Activation.has_zeros`). It
    takes no gradient.
    """
    layer = model.each_block()[0].feed_forward
    weight, activation = layer.proj_in.weight, layer.activation
    reads: type[ActiveBlocks | ActiveUnits]
    if (
        isinstance(activation, RoutedBlocks)
        and rows <= MOST_ROWS
        and model.backend == "triton"  # not by itself, as no GPU has shown yet that the kernels are right
        and can_run_kernels(model.backend, weight.device, weight.dtype, 0)
    ):
        reads = ActiveBlocks
    elif activation.has_zeros and rows == 1 and weight.device.type == "cpu":
        reads = ActiveUnits
    else:
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    for block in copied.each_block():
        block.feed_forward = reads(block.feed_forward)  # type: ignore[assignment]
    return copied


def weights_read(model: Transformer) -> float | None:
    """The share of the feed-forward's weights that was read in steps of few rows, or None if no layer counts it."""
    layers = [each for each in model.modules() if isinstance(each, (ActiveBlocks, ActiveUnits))]
    rows = sum(each.steps * each.layer.activation.total_width for each in layers)
    return sum(each.rows_read for each in layers) / rows if rows else None
