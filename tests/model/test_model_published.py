"""A model converted from the published one has the same weights, settings and logits."""

from __future__ import annotations

from typing import Any

import coordinate_descent_attention as published
import pytest
import torch
from colt5_attention import coor_descent
from torch import Tensor, nn
from torch.nn import functional as F

from cda_cli.model import from_published, state_tensors

SIZES: dict[str, Any] = {"num_tokens": 29, "dim": 20, "seq_len": 17, "depth": 2, "dim_head": 8, "heads": 3}


def build(**settings: Any) -> Any:
    """Builds a published model whose parts all show in the logits: those that start at 0, 1 or −10 are drawn too."""
    torch.manual_seed(0)
    model = published.Transformer(**{**SIZES, **settings}).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            nn.init.normal_(parameter, mean=parameter.mean().item() / 10, std=0.5)
    return model


def dense_logits(model: Any, batch: Tensor) -> Tensor:
    """Computes the published forward, with its operator for CPUs in place of the one for GPUs.

    The operator for GPUs takes a flat k, and the one for CPUs does not. The sparse feed-forward never runs at all,
    because of a misspelt name. This is therefore what the source says, and not what it does.
    """
    x = model.token_emb(batch) + model.pos_emb.weight[: batch.shape[1]]
    for attention, feed_forward in model.layers:
        x = x + _attention(attention, x)
        x = x + _feed_forward(feed_forward, x)
    return model.to_logits(x)


def _operator(layer: Any, scores: Tensor, k: float | Tensor, mask: Tensor | None = None) -> Tensor:
    return coor_descent(
        scores,
        n_iters=layer.coor_descent_iters,
        k=k,
        eps=layer.coor_descent_eps,
        eps_init=layer.coor_descent_eps_init,
        eps_decay=layer.coor_descent_eps_decay,
        mask=mask,
    )


def _attention(layer: Any, x: Tensor) -> Tensor:
    x = layer.norm(x)
    B, T, _ = x.shape
    query, key, value = (part.view(B, T, layer.heads, -1).transpose(1, 2) for part in layer.to_qkv(x).chunk(3, -1))
    null_key, null_value = (part.expand(B, -1, -1, -1) for part in layer.null_kv)
    key, value = torch.cat((null_key, key), 2), torch.cat((null_value, value), 2)
    scores = query @ key.transpose(-1, -2) * layer.scale
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(key.shape[2] - T)
    if not layer.use_coor_descent:
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    elif layer.to_learned_k is None:
        weights = _operator(layer, scores, float(layer.coor_descent_sparsity_k), mask)
    else:
        k = 1 + (layer.coor_descent_sparsity_k - 1) * torch.sigmoid(layer.to_learned_k(x))
        weights = _operator(layer, scores, k.transpose(1, 2), mask)
    return layer.to_out((weights @ value).transpose(1, 2).reshape(B, T, -1))


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    hidden = layer.proj_in(x)
    if layer.use_coor_descent:
        return layer.proj_out(_operator(layer, hidden, float(layer.coor_descent_sparsity_k)))
    return layer.proj_out(F.gelu(hidden))


def tokens(batch: int = 2, length: int = SIZES["seq_len"]) -> Tensor:
    return torch.randint(SIZES["num_tokens"], (batch, length), generator=torch.Generator().manual_seed(1))


RUNNABLE: list[dict[str, Any]] = [
    {},
    {"attn_null_kv": 2},
    {"attn_use_coor_descent": True},
    {"attn_use_coor_descent": True, "attn_null_kv": 2},
    {"attn_use_coor_descent": True, "attn_coor_descent_sparsity_k": 5, "coor_descent_iters": 25, "attn_null_kv": 1},
    {"attn_use_coor_descent": True, "coor_descent_eps": 0.5, "ff_mult": 3},
    {"learned_sparsity_k": True},
]
OTHERS: list[dict[str, Any]] = [
    {"attn_use_coor_descent": True, "learned_sparsity_k": True, "attn_coor_descent_sparsity_k": 4},
    {"attn_use_coor_descent": True, "learned_sparsity_k": True, "attn_null_kv": 2, "coor_descent_eps": 0.4},
    {"ff_use_coor_descent": True, "ff_coor_descent_sparsity_k": 9},
    {
        "attn_use_coor_descent": True,
        "ff_use_coor_descent": True,
        "learned_sparsity_k": True,
        "attn_coor_descent_sparsity_k": 3,
        "ff_coor_descent_sparsity_k": 16,
        "attn_null_kv": 1,
    },
]


def name(settings: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items()) or "softmax"


@pytest.mark.parametrize("settings", RUNNABLE, ids=name)
def test_the_logits_are_those_of_the_published_model(settings: dict[str, Any]) -> None:
    model = build(**settings)
    ours = from_published(model)
    with torch.no_grad():
        for length in (1, 5, SIZES["seq_len"]):
            torch.testing.assert_close(ours(tokens(length=length)), model(tokens(length=length)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", RUNNABLE, ids=name)
def test_the_dense_computation_is_that_of_the_published_model(settings: dict[str, Any]) -> None:
    """Otherwise the comparisons with it, for settings that only a GPU runs, would mean nothing."""
    model = build(**settings)
    with torch.no_grad():
        torch.testing.assert_close(dense_logits(model, tokens()), model(tokens()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", OTHERS, ids=name)
def test_the_logits_are_those_of_the_dense_computation(settings: dict[str, Any]) -> None:
    """The published source cannot run these settings on a CPU: a learned k, and a sparse feed-forward."""
    model = build(**settings)
    with torch.no_grad():
        torch.testing.assert_close(from_published(model)(tokens()), dense_logits(model, tokens()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("settings", RUNNABLE + OTHERS, ids=name)
def test_every_weight_is_carried_and_copied(settings: dict[str, Any]) -> None:
    """No weight is left behind, or shared with the published model, which training ours would then change."""
    model = build(**settings)
    ours = from_published(model)
    theirs = {key: value.clone() for key, value in model.state_dict().items()}
    if "attn_use_coor_descent" not in settings:
        theirs = {key: value for key, value in theirs.items() if "to_learned_k" not in key}  # not read by a softmax
    carried = [tensor.clone() for tensor in state_tensors(ours).values() if tensor.numel()]
    for key, value in theirs.items():
        same = any(value.shape == tensor.shape and torch.equal(value, tensor) for tensor in carried)
        assert same or not value.numel(), f"{key} was not carried over"
    assert sum(tensor.numel() for tensor in carried) == sum(value.numel() for value in theirs.values())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 1.0
    for key, value in theirs.items():
        assert torch.equal(model.state_dict()[key], value), f"{key} is shared with the published model"


def test_every_setting_is_carried() -> None:
    model = build(
        attn_use_coor_descent=True,
        ff_use_coor_descent=True,
        attn_coor_descent_sparsity_k=5,
        ff_coor_descent_sparsity_k=7,
        coor_descent_iters=13,
        coor_descent_eps=0.25,
        attn_null_kv=3,
        learned_sparsity_k=True,
        ff_mult=2.5,
    )
    config = from_published(model).config
    sizes = {"vocab_size": 29, "dim": 20, "seq_len": 17, "depth": 2, "dim_head": 8, "heads": 3, "null_kv": 3}
    operator = {"attn_k": 5, "ff_k": 7, "attn_eps": 0.25, "ff_eps": 0.25, "n_iters": 13, "solver": "iterative"}
    parts = {"attention": "coordinate-descent", "ff": "coordinate-descent", "learned_k": True, "ff_units": 50}
    annealing = {"eps_init": 4.0, "eps_decay": 0.7}
    for key, value in (sizes | operator | parts | annealing).items():
        assert getattr(config, key) == value, f"{key} was not carried over"


@pytest.mark.parametrize("ff_mult", [0.3, 1.1, 2.7, 3, 4, 2 / 3])
def test_a_feed_forward_of_any_width_is_carried(ff_mult: float) -> None:
    """The ratio rounds: it must not take a unit away."""
    for dim in range(10, 60, 7):
        model = published.Transformer(**{**SIZES, "dim": dim, "depth": 1, "ff_mult": ff_mult})
        assert from_published(model).config.ff_units == model.layers[0][1].proj_out.in_features


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_carried(training: bool) -> None:
    assert from_published(build().train(training)).training is training
