"""What each process of a group does to compare models that divide sequences among them with the same models alone.

A job of `processes.Nursery`, which calls `run`.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import torch
from torch import Tensor

from cda_cli.config import Config, ModelConfig
from cda_cli.data import Batch
from cda_cli.model import Transformer
from cda_cli.training.distributed.launch import ErrorCoordinator, Mesh
from cda_cli.training.distributed.processes import ALONE, Processes
from cda_cli.training.gradients import accumulate_gradients
from tests.model.cases import build, cases, name, tiny, tokens

CPU, LENGTH = torch.device("cpu"), 24
MORE: tuple[dict[str, Any], ...] = (
    {"attention": "hard-topk", "null_kv": 2, "position": "rotary"},
    {"attention": "tempered-softmax", "learned_eps": True, "null_kv": 1},
    {"attention": "coordinate-descent", "attn_k": 2.0, "eps_anneal_start": 1.0, "qk_norm": True, "position": "rotary"},
)


def run() -> None:
    """Ends with the code 1, and the traceback of the first model that differs, unless all are the same."""
    coordinator = ErrorCoordinator()
    mesh = Mesh(1, coordinator.place.processes, shards=False)
    torch.set_num_threads(1)
    with Processes(coordinator.place, coordinator.store(), mesh) as processes:
        processes.meet(CPU, minutes=1)
        for number, config in enumerate([*cases(), *(tiny(**settings) for settings in MORE)]):
            sizes = {"seq_len": LENGTH, "dropout": 0.0}
            try:
                compare(config.model_copy(update=sizes), processes, checkpointing=number % 2 == 0)
            except AssertionError:
                traceback.print_exc()
                sys.exit(f"{name(config)} differs")


def compare(config: ModelConfig, processes: Processes, checkpointing: bool) -> None:
    """Raises AssertionError if loss, logits or gradients of a model differ from those that it has alone."""
    whole = tokens(config, length=LENGTH + 1)
    batch = Batch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous(), torch.ones(len(whole)))
    alone, together = build(config), build(config)
    wrapped = processes.wrap(together, Config(), CPU, torch.float32, compiled=False)
    alone.activation_checkpointing = together.activation_checkpointing = checkpointing
    loss = accumulate_gradients(alone, [batch], CPU, torch.float32, ALONE)
    found = accumulate_gradients(wrapped, [batch], CPU, torch.float32, processes)
    torch.testing.assert_close(found, loss)
    torch.testing.assert_close(taken(together), taken(alone), rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(together(batch.inputs), alone(batch.inputs), rtol=1e-4, atol=1e-5)


def taken(model: Transformer) -> dict[str, Tensor]:
    """Returns the gradients, and forgets them."""
    found = {label: weight.grad for label, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad(set_to_none=True)
    return {label: gradient.clone() for label, gradient in found.items() if gradient.numel()}
