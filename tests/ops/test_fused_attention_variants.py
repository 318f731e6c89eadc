"""Every variant of the fused attention that an argument selects, forward and backward, against float64.

On a GPU each is another compiled kernel: the whole matrix. The interpreter compiles nothing, so there it is the part of
the matrix in which the source differs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cda_cli.ops import soft_topk_attention
from tests.ops.attention_problems import assert_at_most_twice_plain, differentiable_problem, fused, moved, packed
from tests.ops.cases import DEVICE

ON_GPU = DEVICE == "cuda"
B, H = 1, 2
# With keys in front, and long enough that some tiles are seen whole; on a GPU, as many as the kernels in Gluon take.
T, S = (150, 2100) if ON_GPU else (70, 140)


def cycle(*numbers: float) -> Tensor:
    """[T]"""
    return torch.tensor(numbers).repeat(T // len(numbers) + 1)[:T]


# k, and the bound that the kernels are told.
BUDGETS = {
    "k = 2": (2.0, 2.0),
    "k = 7": (7.0, 7.0),
    "a k of each query up to 2": (cycle(0.5, 1.0, 1.5, 2.0), 2.0),
    "a k of each query": (cycle(0.5, 1.0, 2.5, 7.0), None),
}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("documents", [None, packed(33, 1, 2, 60, S - 96)[None]], ids=["one text", "documents"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
@pytest.mark.parametrize("memory", ["whole", "grouped heads", "unaligned"] if ON_GPU else ["grouped heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32] if ON_GPU else [torch.bfloat16])
@pytest.mark.parametrize("width", [16, 32, 64, 80, 96, 128, 256] if ON_GPU else [16])
def test_every_variant(
    width: int, dtype: torch.dtype, memory: str, causal: bool, documents: Tensor | None, budget: str
) -> None:
    """With gradients, and without: then the kernels keep less, and k may be a plain number."""
    k, largest_k = BUDGETS[budget]
    key_heads = 1 if memory == "grouped heads" else H
    this = differentiable_problem(
        (B, H, T, S, width), k, dtype=dtype, causal=causal, key_heads=key_heads, documents=documents, eps=0.3
    )
    placed = moved(this, 1) if memory == "unaligned" else this
    assert_at_most_twice_plain(this, fused(placed, largest_k=largest_k))
    inputs = [tensor.to(DEVICE) for tensor in placed[:3]]
    settings = this.settings(DEVICE) | {"largest_k": largest_k, "backend": "triton"}
    output = soft_topk_attention(*inputs, k.to(DEVICE) if isinstance(k, Tensor) else k, **settings)
    assert_at_most_twice_plain(this, [output.cpu()])
