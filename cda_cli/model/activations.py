"""The activations of the feed-forward layer, by their names in the configuration (`model.ff`).

To add one, write its class, add a line to `ACTIVATIONS` and its name to `ModelSettings.ff`, and test it.

Shapes: B batch, T positions, F units of the feed-forward layer (`ModelConfig.ff_units`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.model.layers import solver_settings
from cda_cli.ops import Backend, Choice, soft_topk


class Activation(ABC):
    """What a feed-forward layer does with its hidden units."""

    is_gated = False  # A third matrix makes a gate of as many units from the layer's input.
    uses_operator = False  # `cda_cli.ops` computes it, with a solver and a backend.

    def __init__(self, config: ModelConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend

    @abstractmethod
    def __call__(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        """Returns the activations [B, T, F] of `hidden` [B, T, F], in its dtype; `gate` [B, T, F] if it is gated."""

    @property
    def matrices(self) -> int:
        """The number of matrices of dim × F weights."""
        return 3 if self.is_gated else 2

    def scratch(self, batch_size: int, choice: Choice) -> dict[str, int]:
        """Returns the bytes that an operator takes for itself, by the start of its name, as measured on a CPU."""
        return {}

    def warnings(self) -> list[str]:
        """Returns a sentence about each setting that is allowed but can hardly be meant."""
        return []


class Gelu(Activation):
    def __call__(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        return F.gelu(hidden)


class TanhGelu(Activation):
    """GELU by a tanh (arXiv 1606.08415, section 2), as GPT-2 has it."""

    def __call__(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        return F.gelu(hidden, approximate="tanh")


class ReluSquared(Activation):
    """max(0, x)², from Primer (arXiv 2109.08668): most units are exactly 0."""

    def __call__(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        return F.relu(hidden).square()


class SwiGlu(Activation):
    """silu(gate) · x (arXiv 2002.05202). With ff_mult = 8/3 it has as many weights as the others with 4."""

    is_gated = True

    def __call__(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        return F.silu(gate) * hidden


class SoftTopKActivation(Activation):
    """The soft top-k weights of the hidden units. They stand alone, without the units, as in the published model."""

    uses_operator = True

    def __call__(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        config = self.config
        return soft_topk(hidden, config.ff_k, eps=config.ff_eps, backend=self.backend, **solver_settings(config))

    def scratch(self, batch_size: int, choice: Choice) -> dict[str, int]:
        """The operator takes nine float32 tensors as large as the scores forward, and six backward."""
        config = self.config
        units = 0 if choice.name == "triton" else batch_size * config.seq_len * config.ff_units
        return {"cda.soft_topk_backward": 4 * 6 * units, "cda.soft_topk.": 4 * 9 * units}

    def warnings(self) -> list[str]:
        k, units = self.config.ff_k, self.config.ff_units
        return [f"ff_k {k:g} covers all {units} units of a row: every activation is 1"] if k >= units else []


ACTIVATIONS: dict[str, type[Activation]] = {
    "gelu": Gelu,
    "gelu-tanh": TanhGelu,
    "coordinate-descent": SoftTopKActivation,
    "relu2": ReluSquared,
    "swiglu": SwiGlu,
}


def feed_forward_activation(config: ModelConfig, backend: Backend = "auto") -> Activation:
    """Makes the activation of `config`, as one layer uses it."""
    return ACTIVATIONS[config.ff](config, backend)
