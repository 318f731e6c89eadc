"""Activation checkpointing computes the same numbers to the last bit, and keeps less for the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cda_cli.model import Transformer
from cda_cli.model.cache import StaticCache
from tests.model.cases import build, tiny, tokens

MODELS: list[dict[str, Any]] = [
    {"attention": "softmax", "dropout": 0.3},
    {"attention": "coordinate-descent", "learned_k": True, "position": "rotary", "norm": "rmsnorm", "qk_norm": True},
    {"attention": "coordinate-descent", "ff": "coordinate-descent", "solver": "iterative", "dropout": 0.3},
]


def backward(model: Transformer, batch: Tensor) -> tuple[list[Tensor], int]:
    """Returns the loss and every gradient, and the bytes that autograd kept for them, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)], sum(kept.values())


@pytest.mark.parametrize("settings", MODELS, ids=str)
def test_the_gradients_are_the_same_to_the_last_bit(settings: dict[str, Any]) -> None:
    """That includes dropout: what is computed again must draw the same numbers again."""
    config = tiny(**settings, depth=4)
    model, batch = build(config).train(), tokens(config)
    plain, kept = backward(model, batch)
    model.activation_checkpointing = True
    checkpointed, kept_now = backward(model, batch)
    assert len(plain) == len(checkpointed)
    assert all(a.equal(b) for a, b in zip(plain, checkpointed, strict=True))
    assert kept_now < kept / 2, "nothing was saved by it"


def test_generation_is_left_alone() -> None:
    """Without gradients there is nothing to keep, and a block that ran twice would fill its cache twice."""
    config = tiny()
    model, batch = build(config), tokens(config)
    expected = model(batch).detach()
    model.activation_checkpointing = True
    with torch.no_grad():
        cache = StaticCache(model, len(batch), torch.float32).rows()
        parts = [model(batch[:, :4], cache), model(batch[:, 4:], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)
    assert cache.length == config.seq_len
