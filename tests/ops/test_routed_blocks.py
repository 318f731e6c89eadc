"""The feed-forward of routed blocks against float64: on a GPU where there is one, elsewhere in Triton's interpreter.

The weights of blocks that no row selects are NaN, as they may not be read.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.ops import routed_blocks
from tests.ops.cases import DEVICE

TOLERANCE = 1e-3
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # the error of a rounding


class Problem(NamedTuple):
    x: Tensor
    factors: Tensor
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


def problem(rows: int, width: int, blocks: int, size: int, selected: int, bias: bool, dtype: torch.dtype) -> Problem:
    """Each row selects up to `selected` blocks of its own, and has a factor below the tolerance on the others."""
    draw = torch.Generator().manual_seed(rows + 31 * width + 101 * blocks + 1009 * size)
    units = blocks * size
    factors = torch.full((rows, blocks), TOLERANCE / 2)
    for row in factors:
        row[torch.randperm(blocks, generator=draw)[:selected]] = 0.1 + torch.rand(selected, generator=draw)
    shapes: list[tuple[int, ...]] = [(rows, width), (units, width), (units,), (width, units), (width,)]
    x, up, up_bias, down, down_bias = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    unread = (factors <= TOLERANCE).all(0).repeat_interleave(size)
    up[unread], up_bias[unread], down[:, unread] = torch.nan, torch.nan, torch.nan
    return Problem(x, factors.to(dtype), up, up_bias if bias else None, down, down_bias if bias else None)


def computed(this: Problem, dtype: torch.dtype, read: Tensor | None = None) -> Tensor:
    tensors = (None if tensor is None else tensor.to(DEVICE) for tensor in this)
    counted = None if read is None else read.to(DEVICE)
    output = routed_blocks(*tensors, tolerance=TOLERANCE, dtype=dtype, read=counted)  # type: ignore[arg-type]
    if read is not None and counted is not None:
        read.copy_(counted)
    return output.cpu()


def assert_right(this: Problem, output: Tensor) -> None:
    """A sum of n products is right to n roundings of the sum of their sizes, and the output is rounded once more."""
    x, factors, up, down = (tensor.double() for tensor in (this.x, this.factors, this.up, this.down))
    up_bias, down_bias = (0 if bias is None else bias.double() for bias in (this.up_bias, this.down_bias))
    factors = factors.where(factors > TOLERANCE, 0).repeat_interleave(len(up) // factors.shape[1], 1)
    hidden = (x @ up.nan_to_num().T + torch.as_tensor(up_bias).nan_to_num()).relu()
    largest = x.abs() @ up.nan_to_num().abs().T + torch.as_tensor(up_bias).nan_to_num().abs()
    expected = (factors * hidden.square()) @ down.nan_to_num().T + down_bias
    sizes = (factors * largest.square()) @ down.nan_to_num().abs().T + abs(down_bias)
    roundings = 2 * (x.shape[1] + 3) + len(up) + 5
    bound = roundings * 2.0**-24 * sizes + UNIT[output.dtype] * expected.abs()
    assert ((output.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", UNIT, ids=str)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 40),
    blocks=st.integers(1, 9),
    size=st.integers(1, 9),
    share=st.floats(0, 1),
    bias=st.booleans(),
)
def test_rows_get_what_the_whole_layer_gives(
    rows: int, width: int, blocks: int, size: int, share: float, bias: bool, dtype: torch.dtype, fenced: list[Tensor]
) -> None:
    """With no block, some and all of them; nothing is written outside, and what is counted is what a row selects."""
    this = problem(rows, width, blocks, size, round(share * blocks), bias, dtype)
    read = torch.tensor([5, 7])
    output = computed(this, dtype, read)
    assert output.dtype == dtype
    assert_right(this, output)
    selected = int((this.factors > TOLERANCE).any(0).sum())
    assert read.tolist() == [5 + selected, 7 + blocks]


@pytest.mark.parametrize(
    ("width", "blocks", "size"), [(4100, 2, 3), (3, 70, 64), (5, 2, 5000)], ids=["wide", "many blocks", "large blocks"]
)
def test_sizes_beyond_a_tile_take_several(width: int, blocks: int, size: int) -> None:
    this = problem(1, width, blocks, size, 1, True, torch.float32)
    assert_right(this, computed(this, torch.float32))


def test_a_row_is_as_it_is_alone() -> None:
    this = problem(5, 37, 6, 8, 2, True, torch.float32)
    together = computed(this, torch.float32)
    for row in range(5):
        one = this._replace(x=this.x[row : row + 1], factors=this.factors[row : row + 1])
        assert torch.equal(computed(one, torch.float32)[0], together[row])


def test_a_factor_of_nan_reaches_the_output() -> None:
    this = problem(2, 8, 3, 4, 3, True, torch.float32)
    this.factors[1, 2] = torch.nan
    assert computed(this, torch.float32).isnan().any(1).tolist() == [False, True]
