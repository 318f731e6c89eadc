"""The count of floating-point operations, beside PyTorch's own counter and sums that are written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cda_cli.config import Config, parse
from cda_cli.model import Transformer
from cda_cli.training.accounting.flops import flops_per_token, peak_flops

MODEL: dict[str, Any] = {"vocab_size": 50, "seq_len": 12, "dim": 16, "depth": 3, "heads": 2, "dim_head": 6}


def a_config(checkpointing: bool = False, **model: object) -> Config:
    return parse({"model": MODEL | model, "run": {"activation_checkpointing": checkpointing}})


def attention_alone(config: Config, backend: str = "torch") -> float:
    """What the count says of attention, in products of one query with one key's width, of one layer."""
    model = config.model
    narrow = flops_per_token(config, backend).computed - linear(config)
    return narrow / (2 * model.heads * model.head_width * model.depth)


def linear(config: Config) -> float:
    """PyTorch's count of a token's linear layers: the custom operator of attention is one that it passes over."""
    torch.manual_seed(0)
    model = Transformer(config.model)
    model.activation_checkpointing = config.run.activation_checkpointing
    tokens = torch.randint(config.model.vocab_size, (4, config.model.seq_len))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    counted = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counted.items() if "mm" in str(operator)) / tokens.numel()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "model",
    [
        {},
        {"learned_k": True},
        {"output_gate": True},
        {"tied_embeddings": True},
        {"dropout": 0.1},
        {"ff": "coordinate-descent", "ff_k": 4},
        {"ff": "relu2"},
        {"ff": "swiglu"},
    ],
    ids=str,
)
def test_linear_layers_are_counted_as_pytorch_counts_them(model: dict[str, Any], checkpointing: bool) -> None:
    """What is left of the count is attention: whole products of a query with the half of the keys that it sees."""
    seen = (12 + 1) / 2
    products = attention_alone(a_config(checkpointing, **model)) / seen
    assert products == pytest.approx(9 if checkpointing else 7)


@pytest.mark.parametrize(
    ("model", "backend", "products", "keys"),
    [
        ({"attention": "softmax"}, "torch", 7, 6.5),
        ({"attention": "softmax", "null_kv": 2}, "torch", 7, 14),
        ({}, "torch", 7, 6.5),
        ({"null_kv": 2}, "triton", 10, 8.5),
        ({"attn_k": 3.0}, "triton", 11, 6.5),
        ({"solver": "iterative"}, "triton", 7, 6.5),
        ({"solver": "iterative"}, "colt5", 6, 12),
    ],
    ids=str,
)
def test_attention_is_counted_as_it_is_computed(
    model: dict[str, Any], backend: str, products: int, keys: float
) -> None:
    """Half of the square where it is causal; the kernels of the exact solver go over their scores a second time."""
    assert attention_alone(a_config(**model), backend) == pytest.approx(products * keys)


@pytest.mark.parametrize("attention", ["hard-topk", "entmax"])
def test_dense_weights_are_counted_as_pytorch_counts_them(attention: str) -> None:
    """Its counter sees all of their products."""
    config = a_config(attention=attention, null_kv=2, output_gate=True)
    assert flops_per_token(config, "torch").computed == linear(config)


def test_the_dense_figure_is_the_convention() -> None:
    """6N + 12·L·d·T, whatever is computed: N of GPT-2 small without what is only looked up, and its sequences."""
    gpt2 = {
        "vocab_size": 50304, "seq_len": 1024, "dim": 768, "depth": 12, "heads": 12, "position": "rotary",
        "norm": "rmsnorm", "tied_embeddings": True,
    }  # fmt: skip
    for attention in ("softmax", "coordinate-descent"):
        config = parse({"model": gpt2 | {"attention": attention}})
        found = flops_per_token(config, "triton").dense
        with torch.device("meta"):
            N = Transformer(config.model).parameter_count()
        assert 123e6 < N < 125e6
        assert found == pytest.approx(6 * N + 12 * 12 * 768 * 1024, rel=1e-3)


def test_a_cpu_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
        ("NVIDIA H20", None), ("NVIDIA A10G", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_peaks_are_those_of_the_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    """A GPU that is not known has none, rather than that of one with a like name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
