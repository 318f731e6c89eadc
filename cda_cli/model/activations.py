"""The activations of the feed-forward layer, by their names in the configuration (`model.ff`).

To add one, write its class, add a line to `ACTIVATIONS` and its name to `ModelSettings.ff`, and test it.

Shapes: B batch, T positions, F units of the feed-forward layer (`ModelConfig.ff_units`), G outputs of its gate,
N blocks of units.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.model.layers import solver_settings
from cda_cli.ops import Backend, Choice, largest_entries, soft_topk


class Activation(ABC):
    """What a feed-forward layer does with its hidden units."""

    uses_operator = False  # `cda_cli.ops` computes it, with a solver and a backend.
    has_zeros = False  # Many activations are exactly 0, so that their units need not be read.
    block_size: int | None = None  # the units of a block, where a router chooses among blocks

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend

    @abstractmethod
    def __call__(self, hidden: Tensor, factors: Tensor | None) -> Tensor:
        """Returns the activations [B, T, F] of `hidden` [B, T, F], in its dtype; if gated, by `factors` [B, T, G]."""

    @property
    def gate_width(self) -> int:
        """The numbers G of a gate, which a third matrix makes from the layer's input; 0 without a gate."""
        return 0

    @property
    def total_width(self) -> int:
        """The layer has dim × so many weights in its matrices."""
        return 2 * self.config.ff_units + self.gate_width

    def scratch(self, batch_size: int, choice: Choice) -> dict[str, int]:
        """Returns the bytes that an operator takes for itself, by the start of its name, as measured on a CPU."""
        return {}

    def warnings(self) -> list[str]:
        """Returns a sentence about each setting that is allowed but can hardly be meant."""
        return []


def _operator_scratch(config: ModelConfig, row: int, batch_size: int, choice: Choice) -> dict[str, int]:
    """The operator takes nine float32 tensors as large as the scores forward, and six backward. A row has `row`."""
    scores = 0 if choice.name == "triton" else batch_size * config.seq_len * row
    return {"cda.soft_topk_backward": 4 * 6 * scores, "cda.soft_topk.": 4 * 9 * scores}


class Gelu(Activation):
    def __call__(self, hidden: Tensor, factors: Tensor | None) -> Tensor:
        return F.gelu(hidden)


class TanhGelu(Activation):
    """GELU by a tanh (arXiv 1606.08415, section 2), as GPT-2 has it."""

    def __call__(self, hidden: Tensor, factors: Tensor | None) -> Tensor:
        return F.gelu(hidden, approximate="tanh")


class ReluSquared(Activation):
    """max(0, x)², from Primer (arXiv 2109.08668): most units are exactly 0."""

    has_zeros = True

    def __call__(self, hidden: Tensor, factors: Tensor | None) -> Tensor:
        return F.relu(hidden).square()


class HardTopK(Activation):
    """relu² of the ⌊ff_k⌋ largest units (at least one), and 0 elsewhere: only the kept units have a gradient.

    Source: Q-Sparse (arXiv 2407.10969), without its straight-through gradient.
    """

    has_zeros = True

    def __call__(self, hidden: Tensor, factors: Tensor | None) -> Tensor:
        return F.relu(_only_largest(hidden, self.config.ff_k)).square()

    def warnings(self) -> list[str]:
        k, units = self.config.ff_k, self.config.ff_units
        return [f"ff_k {k:g} covers all {units} units of a row: hard-topk is relu2"] if k >= units else []


def _only_largest(x: Tensor, k: float) -> Tensor:
    """Returns `x` where it is among the ⌊k⌋ largest (at least one) of the last dimension, and 0 elsewhere."""
    return x.where(largest_entries(x, max(1, int(k))), 0)


class Gated(Activation):
    """Factors of a gate times values of the units. Each of the G factors is that of F/G neighbouring units.

    Where there is a factor for each unit (arXiv 2002.05202), ff_mult = 8/3 gives the layer as many weights as the
    others have with 4.
    """

    @abstractmethod
    def factors(self, gate: Tensor) -> Tensor:
        """Returns the factors [..., G] of a gate [..., G]; units whose factor is 0 are left out."""

    def values(self, hidden: Tensor) -> Tensor:
        """Returns what is multiplied, of the shape of `hidden`, which may be some of the units."""
        return hidden

    @property
    def gate_width(self) -> int:
        return self.config.ff_units

    def __call__(self, hidden: Tensor, factors: Tensor | None) -> Tensor:
        assert factors is not None
        values = self.values(hidden).unflatten(-1, (self.gate_width, -1))
        return (factors.to(values.dtype).unsqueeze(-1) * values).flatten(-2)


class SwiGlu(Gated):
    """silu(gate) · x."""

    def factors(self, gate: Tensor) -> Tensor:
        return F.silu(gate)


class ReGlu(Gated):
    """max(0, gate) · x: most units are exactly 0."""

    has_zeros = True

    def factors(self, gate: Tensor) -> Tensor:
        return F.relu(gate)


def _soft_topk(scores: Tensor, config: ModelConfig, backend: Backend) -> Tensor:
    return soft_topk(scores, config.ff_k, eps=config.ff_eps, backend=backend, **solver_settings(config))


def _kept_soft_topk(scores: Tensor, config: ModelConfig, backend: Backend) -> Tensor:
    """The soft top-k weights of scores, where those up to `ff_tolerance` are 0."""
    return F.threshold(_soft_topk(scores, config, backend), config.ff_tolerance, 0.0)


class SoftTopKActivation(Activation):
    """The soft top-k weights λ of the units. They stand alone, without the units, as in the published model."""

    uses_operator = True

    def __call__(self, hidden: Tensor, factors: Tensor | None) -> Tensor:
        return _soft_topk(hidden, self.config, self.backend)

    def scratch(self, batch_size: int, choice: Choice) -> dict[str, int]:
        return _operator_scratch(self.config, self.config.ff_units, batch_size, choice)

    def warnings(self) -> list[str]:
        k, units = self.config.ff_k, self.config.ff_units
        return [f"ff_k {k:g} covers all {units} units of a row: every weight is 1"] if k >= units else []


class SoftTopKLinear(SoftTopKActivation):
    """λ · x. What is up to `ff_tolerance` of λ counts as 0, here and below."""

    has_zeros = True

    def __call__(self, hidden: Tensor, factors: Tensor | None) -> Tensor:
        return _kept_soft_topk(hidden, self.config, self.backend) * hidden


class SoftTopKRelu2(SoftTopKLinear):
    """λ · relu²(x)."""

    def __call__(self, hidden: Tensor, factors: Tensor | None) -> Tensor:
        return _kept_soft_topk(hidden, self.config, self.backend) * F.relu(hidden).square()


class SoftTopKGlu(Gated, SoftTopKActivation):
    """λ · x, where λ is the soft top-k of the gate."""

    has_zeros = True

    def factors(self, gate: Tensor) -> Tensor:
        return _kept_soft_topk(gate, self.config, self.backend)


class RoutedBlocks(Gated):
    """relu² of the units, in blocks of `ff_block_size`, each times the weight λ that a router gives it.

    The router is the gate: a score for each block and token. As the layer is linear behind its activations, it returns
    Σ λ_b · block_b(x), as a mixture of experts does (arXiv 1701.06538). No loss balances the blocks.
    """

    has_zeros = True
    tolerance = 0.0  # A weight up to it counts as 0.

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(config, backend)
        self.block_size = config.ff_block_size

    @abstractmethod
    def weights(self, gate: Tensor) -> Tensor:
        """Returns the weights [..., N] of scores [..., N], none below 0."""

    def factors(self, gate: Tensor) -> Tensor:
        return F.threshold(self.weights(gate), self.tolerance, 0.0)

    def values(self, hidden: Tensor) -> Tensor:
        return F.relu(hidden).square()

    @property
    def gate_width(self) -> int:
        return self.config.ff_units // self.config.ff_block_size

    def warnings(self) -> list[str]:
        k, blocks = self.config.ff_k, self.gate_width
        return [f"ff_k {k:g} covers all {blocks} blocks of units: none is left out"] if k >= blocks else []


class SoftTopKBlocks(RoutedBlocks):
    """λ is the soft top-k of the scores."""

    uses_operator = True

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        super().__init__(config, backend)
        self.tolerance = config.ff_tolerance

    def weights(self, gate: Tensor) -> Tensor:
        return _soft_topk(gate, self.config, self.backend)

    def scratch(self, batch_size: int, choice: Choice) -> dict[str, int]:
        return _operator_scratch(self.config, self.gate_width, batch_size, choice)


# A plain router at 0.1 was far behind one at 1 (benchmarks/results/2026-11-30-h200-routing.md).
LEAST_ROUTER_EPS = 0.3


class HardTopKBlocks(RoutedBlocks):
    """λ is k·softmax(scores/ε) of the ⌊k⌋ largest scores (at least one), and 0 elsewhere: the usual top-k router.

    Softmax is over all blocks, as in Switch Transformers (arXiv 2101.03961). The factor k makes λ the soft top-k of a
    row without a capped weight, cut to its ⌊k⌋ largest entries.
    """

    def weights(self, gate: Tensor) -> Tensor:
        k = self.config.ff_k
        return _only_largest(k * (gate.float() / self.config.ff_eps).softmax(-1), k)

    def warnings(self) -> list[str]:
        warnings, eps = super().warnings(), self.config.ff_eps
        if eps < LEAST_ROUTER_EPS:
            warnings.append(f"ff_eps {eps:g} suits soft top-k; a plain router lost less with --set model.ff_eps=1")
        return warnings


class SigmoidTopKBlocks(RoutedBlocks):
    """λ is the sigmoid of score/ε for the ⌊k⌋ largest scores (at least one), and 0 elsewhere.

    It is the router of DeepSeek-V3 (arXiv 2412.19437, equations 13 to 15), without its division by the sum of what is
    kept. In a softmax each block takes weight from all others, and here from none.
    """

    def weights(self, gate: Tensor) -> Tensor:
        # The scores decide, since the sigmoids of large ones round to the same.
        kept = largest_entries(gate, max(1, int(self.config.ff_k)))
        return (gate.float() / self.config.ff_eps).sigmoid().where(kept, 0)


ACTIVATIONS: dict[str, type[Activation]] = {
    "gelu": Gelu,
    "gelu-tanh": TanhGelu,
    "coordinate-descent": SoftTopKActivation,
    "coordinate-descent-linear": SoftTopKLinear,
    "coordinate-descent-relu2": SoftTopKRelu2,
    "coordinate-descent-glu": SoftTopKGlu,
    "relu2": ReluSquared,
    "hard-topk": HardTopK,
    "swiglu": SwiGlu,
    "reglu": ReGlu,
    "blocks": SoftTopKBlocks,
    "hard-topk-blocks": HardTopKBlocks,
    "sigmoid-topk-blocks": SigmoidTopKBlocks,
}


def feed_forward_activation(config: ModelConfig, backend: Backend = "auto") -> Activation:
    """Makes the activation of `config`, as one layer uses it."""
    return ACTIVATIONS[config.ff](config, backend)
