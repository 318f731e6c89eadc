"""Rows whose largest score, the leader, moves from tile to tile, stands far above the rest, or is not the only one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cda_cli.ops import soft_topk_attention
from tests.ops.attention_problems import Problem, assert_at_most_twice_plain, fused, fused_output, problem, smooth
from tests.ops.cases import DEVICE, random_rows

# One pass over the keys (attention_one_pass.py) is for half precision on a GPU, wide heads and long rows.
WIDTHS = (128, 64) if DEVICE == "cuda" else (8,)
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
BOUNDS = (2.0, None)  # Kernels for k ≤ 2, and for any k.
QUERIES, KEYS = (200, 8300) if DEVICE == "cuda" else (20, 100)
TILE = KEYS // 10
MATE = 64 if DEVICE == "cuda" else 32  # One pass has keys in one class that lie so far apart.


def stairs(bits: float) -> Callable[[Tensor], None]:
    """A leader in each tile, so many powers of two above the last one."""

    def shape(scores: Tensor) -> None:
        scores -= 60
        steps = torch.arange(0, KEYS, TILE)
        scores[steps + steps % 7] = -50 + bits * torch.arange(float(len(steps)))

    return shape


def pairs(bits: float) -> Callable[[Tensor], None]:
    """Such stairs with another score 3 below each leader, in its class."""

    def shape(scores: Tensor) -> None:
        stairs(bits)(scores)
        [steps] = torch.nonzero(scores[:-MATE] > -55, as_tuple=True)
        scores[steps + MATE] = scores[steps] - 3

    return shape


def ramp(slope: float) -> Callable[[Tensor], None]:
    return lambda scores: scores.copy_(slope * torch.arange(float(KEYS)))


def sink(place: int) -> Callable[[Tensor], None]:
    def shape(scores: Tensor) -> None:
        scores[place] = 20

    return shape


LEADERS = {
    "stairs of 3 bits": stairs(3), "stairs of 14 bits": stairs(14), "stairs of 14 bits down": stairs(-14),
    "a ramp": ramp(0.1), "a steep ramp": ramp(2.0), "a ramp down": ramp(-0.5), "a sink in front": sink(0),
    "a sink at the end": sink(-1),
}  # fmt: skip


def with_leaders(width: int, shape: Callable[[Tensor], None]) -> Problem:
    """The scores are powers of two: what `shape` makes of zeros, and a little that differs from query to query."""
    for seed in range(20):
        this = problem((1, 2, QUERIES, KEYS, width), 2.0, eps=math.log2(math.e), scale=1.0, causal=False, seed=seed)
        query, key = 0.2 * this.query, 0.2 * this.key
        scores = torch.zeros(KEYS)
        shape(scores)
        query[..., 0], key[..., 0] = 1, scores
        this = this._replace(query=query.to(DTYPE), key=key.to(DTYPE))
        this = this._replace(value=this.value.to(DTYPE), grad_output=this.grad_output.to(DTYPE))
        if smooth(this, 1e-4):
            break
    return this


@pytest.mark.parametrize("largest_k", BOUNDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", LEADERS)
def test_moving_leaders(name: str, width: int, largest_k: float | None) -> None:
    """The output and all gradients but ∂L/∂k, which is δ.

    On stairs the weight that is not capped is nearly that of one key. Its gradient is the small difference of δ and of
    a number that is nearly δ, and in half precision δ comes from a rounded output. So they have the output there.
    """
    this = with_leaders(width, LEADERS[name])
    judged = 1 if name.startswith("stairs") and DEVICE == "cuda" else 4
    assert_at_most_twice_plain(this, fused(this, largest_k=largest_k)[:judged])


@pytest.mark.parametrize("largest_k", BOUNDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("bits", [10, -10])
def test_leaders_in_pairs(bits: float, width: int, largest_k: float | None) -> None:
    """The output, with what a backward needs and without: other kernels may sum the values then.

    The gradients of two passes in float32 have up to five times the error of plain PyTorch's here.
    """
    this = with_leaders(width, pairs(bits))
    assert_at_most_twice_plain(this, [fused_output(this, largest_k=largest_k)])
    inputs = [tensor.to(DEVICE) for tensor in this[:4]]
    output = soft_topk_attention(*inputs, **this.settings(DEVICE), backend="triton", largest_k=largest_k)
    assert_at_most_twice_plain(this, [output.cpu()])


@pytest.mark.parametrize("largest_k", BOUNDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("places", [(3, TILE * 5), (4, 5, 12)], ids=["in two tiles", "in one tile"])
def test_equal_leaders(places: tuple[int, ...], width: int, largest_k: float | None) -> None:
    """Keys that are equal, with values that are not: the output and all gradients but ∂L/∂k, as above."""
    this = problem((1, 2, QUERIES, KEYS, width), 2.0, dtype=DTYPE, eps=0.3, causal=False)
    key = this.key.clone()
    key[:, :, places[1:]] = key[:, :, places[:1]]
    towards = 2 * key[:, :, places[0], None] / width**0.5
    query = (this.query.float() + towards.float() + random_rows(1, 1, QUERIES, 1, seed=9)).to(DTYPE)
    this = this._replace(key=key, query=query)
    assert_at_most_twice_plain(this, fused(this, largest_k=largest_k)[:-1])
