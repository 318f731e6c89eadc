"""The count of floating-point operations equals PyTorch's own counter, and sums that are written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cda_cli.config import Config, parse
from cda_cli.model import Transformer
from cda_cli.training.accounting.flops import flops_per_token, peak_flops

ON_A_CPU = torch.device("cpu"), torch.float32
MODEL: dict[str, Any] = {"vocab_size": 50, "seq_len": 12, "dim": 16, "depth": 3, "heads": 2, "dim_head": 6}


def a_config(checkpointing: bool = False, **model: object) -> Config:
    return parse({"model": MODEL | model, "run": {"activation_checkpointing": checkpointing}})


def attention_alone(config: Config, backend: str = "torch") -> float:
    """Returns what the count says of the attention of one layer, in products of one query with one key's width."""
    model = config.model
    narrow = flops_per_token(config, backend, *ON_A_CPU).computed - linear(config)
    return narrow / (2 * model.heads * model.head_width * model.depth)


def linear(config: Config) -> float:
    """Returns PyTorch's count of a token's linear layers. Its counter passes over the custom operator of attention."""
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
        {"ff": "blocks", "ff_k": 2, "ff_block_size": 16},
        {"ff": "swiglu"},
        {"kv_heads": 1, "attn_bias": "all", "ff_width": 33, "learned_k": True},
    ],
    ids=str,
)
def test_linear_layers_are_counted_as_pytorch_counts_them(model: dict[str, Any], checkpointing: bool) -> None:
    """The rest of the count is attention: products of each query with the half of the keys that it sees."""
    seen = (12 + 1) / 2
    products = attention_alone(a_config(checkpointing, **model)) / seen
    assert products == pytest.approx(9 if checkpointing else 7)


@pytest.mark.parametrize(
    ("model", "backend", "products", "keys"),
    [
        ({"attention": "softmax"}, "torch", 7, 6.5),
        ({"attention": "softmax", "null_kv": 2}, "torch", 7, 14),
        ({}, "torch", 7, 6.5),
        ({"kv_heads": 1}, "torch", 7, 6.5),
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
    """Causal attention computes half of the square. The kernels of the exact solver compute the scores twice."""
    assert attention_alone(a_config(**model), backend) == pytest.approx(products * keys)


@pytest.mark.parametrize("attention", ["hard-topk", "entmax"])
def test_dense_weights_are_counted_as_pytorch_counts_them(attention: str) -> None:
    """PyTorch's counter sees all of their products."""
    config = a_config(attention=attention, null_kv=2, output_gate=True)
    assert flops_per_token(config, "torch", *ON_A_CPU).computed == linear(config)


def test_the_dense_count_is_the_convention() -> None:
    """It is 6N + 12·L·d·T, whatever is computed.

    N is that of GPT-2 small without weights that are only looked up.
    """
    gpt2 = {
        "vocab_size": 50304, "seq_len": 1024, "dim": 768, "depth": 12, "heads": 12, "position": "rotary",
        "norm": "rmsnorm", "tied_embeddings": True,
    }  # fmt: skip
    for attention in ("softmax", "coordinate-descent"):
        config = parse({"model": gpt2 | {"attention": attention}})
        found = flops_per_token(config, "triton", *ON_A_CPU).dense
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
    """An unknown GPU has no peak, rather than that of a GPU with a similar name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
