"""bf16 autocast and torch.compile leave the model the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cda_cli.config import ModelConfig
from cda_cli.model.observe import ObservedAttention, observing
from cda_cli.runtime import autocast
from tests.model.cases import build, cases, name, tiny, tokens

CPU = torch.device("cpu")
ROUNDING = 2.0**-8  # u of bf16: half a unit in the last place of 1
COMPILED: list[dict[str, Any]] = [
    {"attention": "softmax", "null_kv": 2},
    {"attention": "coordinate-descent", "ff": "coordinate-descent", "solver": "iterative"},
    {
        "attention": "coordinate-descent",
        "ff": "coordinate-descent",
        "learned_k": True,
        "output_gate": True,
        "null_kv": 2,
        "position": "rotary",
        "norm": "rmsnorm",
        "qk_norm": True,
        "tied_embeddings": True,
    },
]


def passes(config: ModelConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns the logits and the gradient of the loss, in float32 and with bf16 products."""
    model, batch = build(config), tokens(config)
    logits, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with autocast(CPU, dtype):
            out = model(batch)
        assert out.dtype == dtype
        F.cross_entropy(out[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()).backward()
        parts = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        assert all(part.dtype == torch.float32 for part in parts)
        logits.append(out.detach().float())
        gradients.append(torch.cat(parts))
    return {"logits": (logits[0], logits[1]), "gradient": (gradients[0], gradients[1])}


def error(exact: Tensor, rounded: Tensor) -> float:
    return ((rounded - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("config", cases(), ids=name)
def test_bf16_logits_are_near_float32(config: ModelConfig) -> None:
    found = passes(config)
    assert error(*found["logits"]) <= 4 * ROUNDING
    assert torch.isfinite(found["gradient"][1]).all()


@pytest.mark.parametrize("config", cases(), ids=name)
def test_bf16_gradients_are_near_float32(config: ModelConfig) -> None:
    """k is 1, so that nothing is ever capped. Otherwise the gradient jumps when an entry becomes capped."""
    smooth = config.model_copy(update={"attn_k": 1.0, "ff_k": 1.0})
    assert error(*passes(smooth)["gradient"]) <= 12 * ROUNDING


@pytest.mark.parametrize("attention", ["softmax", "coordinate-descent"])
def test_scores_are_float32_under_autocast(attention: str) -> None:
    """Over a small ε, bf16 scores would give weight to other keys. Their rows must still sum to k exactly."""
    model, seen = build(config := tiny(attention=attention, attn_eps=0.02, attn_k=2.0)), []
    with torch.no_grad(), observing(model, seen.append), autocast(CPU, torch.bfloat16):
        model(tokens(config))
    for one in seen:
        if isinstance(one, ObservedAttention):
            assert one.weights.dtype == torch.float32
            visible = torch.arange(1, config.seq_len + 1).float()
            expected = one.sparsity_k.minimum(visible)
            torch.testing.assert_close(one.weights.sum(-1), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("settings", COMPILED, ids=str)
def test_compiled_logits_and_gradients_are_the_same(settings: dict[str, Any]) -> None:
    """The model is one graph: a break in it would cost the speed that compiling is for."""
    model, batch = build(config := tiny(**settings)), tokens(tiny())
    torch._dynamo.reset()
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        out = forward(batch)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert config.depth == 2
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
