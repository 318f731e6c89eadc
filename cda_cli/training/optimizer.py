"""AdamW and its schedule. The learning rate is a function of the step alone, so there is no state to restore."""

from __future__ import annotations

import math

import torch
from torch import nn

from cda_cli.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only: not on gains, biases and null keys."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.numel()]
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]
    on_gpu = parameters[0].is_cuda
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=on_gpu or None)


def learning_rate(config: OptimConfig, schedule_steps: int, step: int) -> float:
    """Of the step with index `step` (0 the first): linear warm-up, then cosine to min_lr_ratio, or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, schedule_steps - config.warmup_steps))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value
