"""The optimizer and its schedule. The learning rate depends on the step alone, so it has no state to restore."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cda_cli.config import OptimConfig
from cda_cli.training.distributed.sharding import shard_like
from cda_cli.training.nonfinite import StepResult


class MuonAndAdamW:
    """`torch.optim.Muon` for some parameters and AdamW for the others, with the methods of one optimizer."""

    def __init__(self, muon: torch.optim.Muon, adamw: torch.optim.AdamW) -> None:
        self.parts: dict[str, torch.optim.Optimizer] = {"muon": muon, "adamw": adamw}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        return {parameter: state for part in self.parts.values() for parameter, state in part.state.items()}

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


Optimizer = torch.optim.AdamW | MuonAndAdamW


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """Builds the optimizer of `config`, which decays only matrices: no gains, biases or null keys.

    Muon (arXiv 2502.16982) takes the matrices within the model's blocks. AdamW keeps the embeddings, the logits and all
    parameters that are no matrices. Muon's steps are scaled to the size of AdamW's, so that both share one learning
    rate and weight decay.
    """
    named, names = dict(model.named_parameters()), parameter_names(model, config)
    groups = [
        {"params": [named[name] for name in names.decayed], "weight_decay": config.weight_decay},
        {"params": [named[name] for name in names.others], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
    if not names.muon:
        return adamw
    with_muon = [named[name] for name in names.muon]
    muon = torch.optim.Muon(with_muon, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonAndAdamW(muon, adamw)


class ParameterNames(NamedTuple):
    """Which parameters Muon takes, which of AdamW's decay, and its others, each in the order of the optimizer."""

    muon: list[str]
    decayed: list[str]
    others: list[str]

    @property
    def parts(self) -> dict[str, list[str]]:
        """Those of each of the `MuonAndAdamW.parts`."""
        return {"muon": self.muon, "adamw": [*self.decayed, *self.others]}


def parameter_names(model: nn.Module, config: OptimConfig) -> ParameterNames:
    """Says what `build_optimizer` does with each parameter. The model may be on the meta device."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and p.numel()}
    matrices = [name for name, p in named.items() if p.ndim == 2]
    muon = [name for name in matrices if name.startswith("blocks.")] if config.optimizer == "muon" else []
    decayed = [name for name in matrices if name not in muon]
    return ParameterNames(muon, decayed, [name for name, p in named.items() if p.ndim != 2])


def carry_moments(
    optimizer: Optimizer, names: ParameterNames, state: Mapping[str, Any], before: ParameterNames
) -> None:
    """Loads the moments that a state dict has of the parameters with the same names; the others begin without.

    `names` are those of `optimizer`, and `before` those of the model of the state dict.
    """
    parts = optimizer.parts if isinstance(optimizer, MuonAndAdamW) else {"adamw": optimizer}
    states = state if isinstance(optimizer, MuonAndAdamW) else {"adamw": state}
    fitted = {}
    for part, one in parts.items():
        known = {before.parts[part][index]: moments for index, moments in states[part]["state"].items()}
        moments = {index: known[name] for index, name in enumerate(names.parts[part]) if name in known}
        fitted[part] = {"state": moments, "param_groups": one.state_dict()["param_groups"]}
    restore_optimizer(optimizer, fitted if isinstance(optimizer, MuonAndAdamW) else fitted["adamw"])


def restore_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Loads a state dict without the settings in it: the run's configuration or device may have changed since."""
    if isinstance(optimizer, MuonAndAdamW):
        optimizer.load_state_dict({name: _fitted(state[name], part) for name, part in optimizer.parts.items()})
    else:
        optimizer.load_state_dict(_fitted(state, optimizer))


def _fitted(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns `state` with the settings of `optimizer`, and with moments sharded as the parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        index: {name: shard_like(value, parameters[index]) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    groups = [
        group | {"params": saved["params"]}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "state": moments, "param_groups": groups}


def moments_bytes(optimizer: Optimizer) -> int:
    """Returns the bytes of the moments: AdamW keeps two tensors like each parameter, Muon one."""
    groups = optimizer.param_groups
    return sum((2 if "betas" in group else 1) * p.nbytes for group in groups for p in group["params"])


class GuardedOptimizer:
    """Takes only steps whose loss and gradient norm are finite.

    For each step, call `launch` before the host knows whether they are finite, and then `settle`, once it knows. Fused
    AdamW steps in `launch`: the device itself leaves a step out if they are not finite, as it does for gradient
    scaling. The host thus judges the step while the device takes it. If the host judged first, the device would idle
    until all of the next kernels are launched. Muon cannot leave a step out by itself, so it steps in `settle`.

    Either way the gradients are then dropped, and `after_step` is called.
    """

    def __init__(self, optimizer: Optimizer, after_step: Callable[[], None] = lambda: None) -> None:
        self._optimizer, self._after_step = optimizer, after_step
        # Whether the weights of the next step are computed, or being computed on the device, once `launch` returns.
        self.steps_at_launch = isinstance(optimizer, torch.optim.AdamW)

    def launch(self, result: StepResult) -> None:
        """Takes the step if the device can leave it out by itself. The host does not wait for `result`."""
        if self.steps_at_launch:
            self._optimizer.found_inf = (~torch.isfinite(result.sum)).float()  # type: ignore[union-attr]
            self._end_step(take=True)
            del self._optimizer.found_inf  # type: ignore[union-attr]

    def settle(self, finite: bool) -> None:
        """Takes the step if it is `finite` and `launch` did not take it."""
        if not self.steps_at_launch:
            self._end_step(take=finite)

    def _end_step(self, take: bool) -> None:
        if take:
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._after_step()


def learning_rate(config: OptimConfig, schedule_steps: int, step: int) -> float:
    """Returns the rate of the step with index `step`, counted from 0.

    It rises linearly in the warm-up, then follows a cosine down to lr·min_lr_ratio, or stays constant.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, schedule_steps - config.warmup_steps))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
