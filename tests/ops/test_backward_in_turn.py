"""The backward that adds to the gradient of the queries in turn: half precision on an H100, long sequences.

Elsewhere these are small problems for the kernels that stand in for it (attention_backward_in_turn.py).
"""

from __future__ import annotations

import faulthandler
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.ops import fused_products, soft_topk_attention
from tests.ops.attention_problems import (
    NAMES,
    assert_at_most_twice_plain,
    assert_close,
    differentiable_problem,
    expect,
    fused,
    packed,
)
from tests.ops.cases import DEVICE, random_rows

WIDTHS = (64, 80, 128) if DEVICE == "cuda" else (8,)
DTYPES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float32,)
# As many as it takes, and in no case a multiple of a tile.
LEAST, LEAST_WIDE, MORE = (1025, 2049, 200) if DEVICE == "cuda" else (9, 9, 12)


def documents_of(S: int) -> Tensor:
    """Of a tenth, one token, a half, two tokens, and the rest."""
    lengths = (S // 10, 1, S // 2, 2)
    return packed(*lengths, S - sum(lengths))


@pytest.mark.parametrize("width", WIDTHS)
@settings(max_examples=4)  # Each compiles kernels of its own on a GPU.
@given(data=st.data())
def test_gradients_of_any_problem(width: int, data: st.DataObject) -> None:
    """Grouped heads, keys in front, queries that see nothing, documents, any k."""
    G, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    least = LEAST_WIDE if width > 64 else LEAST
    T, S = (least + data.draw(st.integers(0, MORE), name) for name in "TS")
    packs = T <= S and data.draw(st.booleans(), "documents")
    this = differentiable_problem(
        (1, G * group, T, S, width),
        data.draw(st.sampled_from((1.0, 1.5, 2.0, 6.0)), "k"),
        dtype=data.draw(st.sampled_from(DTYPES)),
        eps=data.draw(st.sampled_from((0.3, 1.0)), "eps"),
        causal=data.draw(st.booleans(), "causal"),
        key_heads=G,
        documents=documents_of(S)[None] if packs else None,
    )
    if DEVICE == "cuda":
        assert_at_most_twice_plain(this, fused(this))
    else:
        assert_close(fused(this), expect(this), 1e-4, this)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("causal", [True, False])
def test_no_bit_depends_on_who_runs_when(request: pytest.FixtureRequest, causal: bool, width: int) -> None:
    """More programs than a GPU has room for; the last heads also alone.

    Beside the small kernels of another stream the first programs start one after another, and not all at once.
    """
    B, H, T = (1, 20, 8200) if DEVICE == "cuda" else (1, 2, 20)
    query, key, value, grad = (random_rows(B, H, T, width, seed=seed).to(DEVICE, DTYPES[0]) for seed in range(4))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    attend = partial(soft_topk_attention, eps=0.2, causal=causal, backend="triton")
    output = attend(*leaves, 2.0)
    expected = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    last = [x[:, -1:].detach().requires_grad_() for x in leaves]
    alone = attend(*last, 2.0)
    for name, one, whole in zip(NAMES[1:4], torch.autograd.grad(alone, last, grad[:, -1:]), expected, strict=True):
        assert torch.equal(one, whole[:, -1:]), name
    other, rows = torch.Stream(DEVICE) if DEVICE == "cuda" else None, torch.ones(8192, 512, device=DEVICE)
    # Programs that wait for each other for good would hold up all tests. This ends the process, and names the test.
    faulthandler.dump_traceback_later(120, exit=True)
    request.addfinalizer(faulthandler.cancel_dump_traceback_later)
    for _ in range(20 if DEVICE == "cuda" else 1):
        found = [torch.autograd.grad(attend(*leaves, 2.0), leaves, grad) for _ in range(4)]
        if other is not None:
            with other:
                for _ in range(40):
                    rows.sin().sum(-1)
        for grads in found:
            for name, one, again in zip(NAMES[1:4], expected, grads, strict=True):
                assert torch.equal(one, again), name
        assert torch.equal(attend(*leaves, 2.0), output)


def test_what_is_no_key_has_no_gradient() -> None:
    """One key is in the last tile. The others there read as zeros, above all scores, and fp16 holds no δ as large."""
    query, key, value = (mean + 0.1 * random_rows(1, 1, LEAST, WIDTHS[0], seed=mean) for mean in (2, -2, 8))
    leaves = [x.to(DEVICE, torch.float16).requires_grad_() for x in (query, key, value)]
    output = soft_topk_attention(*leaves, 1.0, eps=0.3, causal=False, backend="triton")
    grads = torch.autograd.grad(output, leaves, torch.full_like(output, 2048))
    for name, grad in zip(NAMES[1:4], grads, strict=True):
        assert grad.isfinite().all(), name


def test_fewer_products_are_counted_where_they_are_made() -> None:
    query, short = torch.Size((1, 2, 2048, 64)), torch.Size((1, 2, 16, 64))
    few = DEVICE == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    device = torch.device(DEVICE)
    assert fused_products(query, query, torch.bfloat16, device, True) == ((2, 5) if few else (3, 7))
    assert fused_products(query, query, torch.bfloat16, device, False) == (4, 5 if few else 7)
    assert fused_products(query, query, torch.float32, device, True) == (3, 7)
    assert fused_products(short, short, torch.bfloat16, device, True) == (3, 7)
