"""The auxiliary losses of a run: an L1 norm of the activations, and a constraint on the support of attention.

The constraint is met by dual ascent. The loss has a term multiplier × (support/target − 1); each step takes a step down
this loss by the weights, and one up by the multiplier, which thus grows while the support is above its target, and
falls while it is below, but not under 0. Sources: Platt and Barr, Constrained Differential Optimization (1987), and,
for the number of connections of attention, arXiv 2512.05865.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cda_cli.config import OptimConfig
from cda_cli.model import ActivationL1, ExcessSupport, Transformer
from cda_cli.training.distributed.processes import Processes
from cda_cli.training.nonfinite import StepResult

MULTIPLIER = "support_multiplier"  # in the state of a checkpoint, and in a train record


class AuxiliaryLosses:
    """Those that `config` asks for, added to the layers of `model`, whose steps have so many `batches` in a process.

    `saved` is the state of the checkpoint that the run goes on from: its multiplier goes on.
    """

    def __init__(
        self,
        config: OptimConfig,
        model: Transformer,
        batches: int,
        device: torch.device,
        saved: Mapping[str, float],
    ) -> None:
        self.rate = config.support_rate
        parts = batches * model.config.depth
        self.l1 = ActivationL1(_leaf(config.ff_l1, device), parts) if config.ff_l1 else None
        self.support = None
        if config.support_target is not None:
            self.support = ExcessSupport(_leaf(saved.get(MULTIPLIER, 0.0), device), config.support_target, parts)
        for block in model.each_block():
            block.feed_forward.auxiliary_loss = self.l1
            block.attention.auxiliary_loss = self.support

    @property
    def weights(self) -> list[Tensor]:
        """The weights of the terms, whose gradients are their values."""
        return [term.weight for term in (self.l1, self.support) if term is not None]

    def begin_step(self) -> None:
        """Forgets what the step before has measured."""
        for weight in self.weights:
            weight.grad = None

    def measured(self, processes: Processes) -> dict[str, Tensor]:
        """Returns what the gradients of a step have measured, by the fields of a train record: scalars on the device.

        They are means over all `processes`, with the same bits in each. The multiplier is that of the step.
        """
        found = {}
        if self.l1:
            found["ff_l1"] = _mean(self.l1.weight, processes)
        if self.support:
            found["support"] = self.support.target * (1 + _mean(self.support.weight, processes))
            found[MULTIPLIER] = self.support.weight.detach().clone()
        return found

    def ascend(self, result: StepResult) -> None:
        """Changes the multiplier after a step, unless that is refused. The host does not wait for `result`."""
        if self.support:
            weight = self.support.weight.detach()  # shares the memory, which compiled code and CUDA graphs read
            excess = result.measured["support"] / self.support.target - 1
            weight.copy_(torch.where(torch.isfinite(result.sum), (weight + self.rate * excess).clamp_min(0), weight))

    def state(self) -> dict[str, float]:
        """Returns what a checkpoint has to hold of them."""
        return {MULTIPLIER: self.support.weight.item()} if self.support else {}


def _leaf(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device, requires_grad=True)


def _mean(weight: Tensor, processes: Processes) -> Tensor:
    assert weight.grad is not None
    return processes.sum(weight.grad / processes.count)
