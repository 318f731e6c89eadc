"""Overlap of what heads read: closed forms, the best assignment, and heads that were only permuted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.comparison.overlap import SharesWatcher, best_assignment, head_overlap, overlaps
from cda_cli.data import evaluation_batches
from cda_cli.inspection import inspect
from cda_cli.model import Transformer
from tests.causal.models import CPU, SEQ_LEN, build, text


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_the_assignment_is_the_best_of_all(rows: int, columns: int, seed: int) -> None:
    gains = np.random.default_rng(seed).integers(0, 5, (rows, columns)).astype(float)  # with equal ones among them
    chosen = best_assignment(gains)
    pairs = [(row, column) for row, column in enumerate(chosen) if column is not None]
    assert len(pairs) == len({column for _, column in pairs}) == min(rows, columns)
    of_few = gains if rows <= columns else gains.T
    best = max(
        sum(of_few[row, column] for row, column in enumerate(order))
        for order in itertools.permutations(range(max(rows, columns)), min(rows, columns))
    )
    assert sum(gains[pair] for pair in pairs) == best


def test_overlaps_have_closed_forms() -> None:
    """One head reads the first key, another halves two, another the last two; of each there are three rows."""
    rows = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]])
    heads = rows.unsqueeze(1).expand(-1, 3, -1)
    torch.testing.assert_close(
        overlaps(heads, heads), torch.tensor([[3.0, 1.5, 0.0], [1.5, 3.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    )


def seen(model: Transformer, windows: int = 4) -> SharesWatcher:
    watcher = SharesWatcher(model.config.depth * model.config.heads, SEQ_LEN, windows)
    batches = evaluation_batches(text(windows * SEQ_LEN + 1), SEQ_LEN, 1)
    inspect(model, batches, CPU, torch.float32, watcher)
    return watcher


def permute_heads(model: Transformer, order: list[int]) -> None:
    """Puts the heads of each layer into another order, so that the model computes the same."""

    def moved(weight: Tensor, groups: int) -> Tensor:
        return weight.unflatten(0, (groups, len(order), -1))[:, order].flatten(0, 2)

    with torch.no_grad():
        for block in model.each_block():
            attention = block.attention
            attention.to_qkv.weight.copy_(moved(attention.to_qkv.weight, 3))
            attention.to_out.weight.copy_(moved(attention.to_out.weight.T, 1).T)
            attention.null_kv.copy_(attention.null_kv[:, order])


def test_heads_that_were_permuted_are_found() -> None:
    model, other = build(attention="softmax", null_kv=0), build(attention="softmax", null_kv=0)
    heads = model.config.heads
    order = [*range(1, heads), 0]
    permute_heads(other, order)
    found = head_overlap(seen(model), seen(other), (heads, heads))
    assert found is not None
    assert found.aligned == pytest.approx(1.0, abs=1e-3), "float16 keeps three digits"
    assert found.any_two < 0.9
    for pair in found.pairs:
        assert (pair.other_layer, order[pair.other_head]) == (pair.layer, pair.head)


def test_what_null_keys_take_is_not_shared() -> None:
    model = build(attention="softmax", null_kv=1)
    with torch.no_grad():
        for block in model.each_block():
            block.attention.null_kv[0] *= 0.0
    found = head_overlap(seen(model), seen(model), (model.config.heads,) * 2)
    assert found is not None
    assert found.aligned < 0.95, "a head shares with itself what it reads of the text, and no more"


def test_one_window_cannot_both_align_and_measure() -> None:
    model = build(attention="softmax")
    assert head_overlap(seen(model, 1), seen(model, 1), (model.config.heads,) * 2) is None


def test_the_overlap_is_that_of_windows_that_did_not_align() -> None:
    """In the first window head 0 reads as head 0 does, and in the second as head 1: so nothing is shared."""
    one, other = SharesWatcher(2, 4, 2), SharesWatcher(2, 4, 2)
    first, last = torch.tensor([[1.0, 0, 0, 0]]), torch.tensor([[0, 0, 0, 1.0]])
    one.windows = [torch.stack([first, last])] * 2
    other.windows = [torch.stack([first, last]), torch.stack([last, first])]
    found = head_overlap(one, other, (2, 2))
    assert found is not None
    assert [pair[:4] for pair in found.pairs] == [(0, 0, 0, 0), (0, 1, 0, 1)]
    assert (found.aligned, found.any_two, found.rows) == (0.0, 0.5, 1)


def test_rows_are_fewer_where_memory_would_run_out() -> None:
    """1,024 heads over 2,048 keys would take two gigabytes with 32 rows of each of 16 windows."""
    assert SharesWatcher(16, 256, 16).step == 256 // 32
    large = SharesWatcher(1024, 2048, 16)
    assert 16 * (2048 // large.step) * 1024 * 2048 * 2 <= 2**28
