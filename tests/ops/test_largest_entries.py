"""`ops.largest_entries` and its kernel: as many entries as asked for, and none left out that is larger."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.ops import largest_entries
from cda_cli.ops.triton import row_launches
from tests.ops.cases import DEVICE, random_rows


def scores_of(kind: str, shape: tuple[int, int], seed: int) -> Tensor:
    normal, other = random_rows(*shape, seed=seed), random_rows(*shape, seed=seed + 1)
    return {
        "normal": normal,
        "tied": normal.round(),
        "both zeros": normal.sign() * 0.0,
        "masked": normal.masked_fill(other < 0, -torch.inf),
        "of all sizes": normal
        * 10.0 ** (10 * other.clamp(-3, 3)),  # no subnormal numbers, which kernels may take for 0
    }[kind]


def assert_largest(chosen: Tensor, scores: Tensor, count: int) -> None:
    assert chosen.dtype == torch.bool
    assert (chosen.sum(-1) == min(count, scores.shape[-1])).all(), "another number of entries"
    least = scores.masked_fill(~chosen, torch.inf).amin(-1)
    most = scores.masked_fill(chosen, -torch.inf).amax(-1)
    assert (least >= most).all(), "a larger entry was left out"


@settings(max_examples=40)
@given(
    n=st.integers(2, 70), rows=st.integers(1, 9), seed=st.integers(0, 999), data=st.data(),
    kind=st.sampled_from(["normal", "tied", "both zeros", "masked", "of all sizes"]),
)  # fmt: skip
def test_the_kernel_chooses_the_largest(n: int, rows: int, kind: str, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n - 1))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    scores = scores_of(kind, (rows, n), seed).to(dtype).to(DEVICE)
    assert_largest(row_launches.largest_entries(scores, count), scores, count)


@pytest.mark.parametrize("count", [1, 3, 8, 9, 40])
def test_the_door_takes_any_shape_and_number(count: int) -> None:
    scores = random_rows(2, 3, 8).to(DEVICE).requires_grad_()
    chosen = largest_entries(scores, count)
    assert_largest(chosen, scores.detach(), count)
    compiled = torch.compile(largest_entries, backend="eager", fullgraph=True)(scores, count)
    assert compiled.equal(chosen)
