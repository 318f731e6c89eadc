"""The store of rows keeps the largest weights, says what the others sum to, and is as small as it was asked to be."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.errors import ConfigError, DataError
from cda_cli.inspection.collect_rows import RowCollector
from cda_cli.inspection.row_codes import from_varints, to_varints
from cda_cli.inspection.store import RowStore, parse_size
from cda_cli.model.observe import ObservedAttention
from cda_cli.ops import soft_topk

EXACTNESS = 0.014  # of a weight, half of one of 254 steps over 10 octaves
REST_STEP = 0.5 / 255  # of the most that a row can sum to
K_STEP = 0.003  # of k, for each octave of it


def soft_rows(H: int, T: int, null: int, seed: int, eps: float = 0.2) -> tuple[Tensor, Tensor]:
    """Weights [H, T, null + T] of a model, and the k of each row, [H, T]; it may be more than a row has keys."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(H, T, null + T, generator=generator)
    k = 0.5 + 4 * torch.rand(H, T, generator=generator)
    mask = torch.ones(T, null + T, dtype=torch.bool).tril(null)
    return soft_topk(scores, k, mask=mask, eps=eps), k


def collected(
    weights: Tensor,
    k: Tensor,
    null: int,
    budget: int,
    keep: float = 0.99,
    layers: int = 1,
    block: int = 5,
    only: Collection[tuple[int, int]] | None = None,
) -> RowStore:
    """The store of `layers` layers which all have the same rows, seen in blocks."""
    collector = RowCollector(layers, budget, keep, only)
    nothing = torch.zeros(0)
    for layer in range(layers):
        for start in range(0, weights.shape[1], block):
            rows = (each[None, :, start : start + block] for each in (weights, k))
            collector.add(ObservedAttention(layer, *rows, null, start, nothing, nothing, nothing))
    return collector.store()


cases = given(
    heads=st.integers(1, 3),
    tokens=st.integers(1, 40),
    null=st.integers(0, 2),
    seed=st.integers(0, 999),
    eps=st.sampled_from([0.02, 0.2, 5.0]),
    budget=st.integers(9_000, 60_000),
)


@settings(max_examples=20, deadline=None)
@cases
def test_what_is_kept_and_what_is_left_make_the_row(
    heads: int, tokens: int, null: int, seed: int, eps: float, budget: int
) -> None:
    weights, k = soft_rows(heads, tokens, null, seed, eps)
    store = collected(weights, k, null, budget)
    content = store.to_bytes()
    assert len(content) <= budget
    assert store.queries == tokens
    store = RowStore.from_bytes(content)
    octaves = np.log2(k.max().item() / k.min().item())
    for head in range(heads):
        for query in range(tokens):
            row, exact = store.row(0, head, query), weights[head, query].double()
            kept = exact[torch.from_numpy(row.keys + null)].numpy()
            assert (np.diff(row.keys) > 0).all()
            np.testing.assert_allclose(row.weights, kept, rtol=EXACTNESS)
            np.testing.assert_array_equal(row.capped, kept >= 1 - 1e-6)
            assert row.sparsity_k == pytest.approx(k[head, query].item(), rel=K_STEP * max(1.0, octaves))
            bound = min(k[head, query].item(), query + 1 + null)
            assert kept.sum() + row.rest == pytest.approx(bound, abs=bound * (REST_STEP + K_STEP * (1 + octaves)))


@settings(max_examples=20, deadline=None)
@cases
def test_each_row_keeps_its_largest_weights(
    heads: int, tokens: int, null: int, seed: int, eps: float, budget: int
) -> None:
    """Caps first, as no weight is larger, and no more keys than hold 99 % of the mass."""
    weights, k = soft_rows(heads, tokens, null, seed, eps)
    store = collected(weights, k, null, budget)
    for head in range(heads):
        shares = []
        for query in range(tokens):
            keys = torch.from_numpy(store.row(0, head, query).keys + null)
            exact = weights[head, query].double()
            is_kept = torch.zeros(len(exact), dtype=torch.bool).index_fill(0, keys, True)
            assert exact[is_kept].min() >= exact[~is_kept].max() if (~is_kept).any() else True
            shares.append((exact[keys].sum() / exact.sum()).item())
            assert exact[keys].sum() - exact[keys].min() < 0.99 * exact.sum() + 1e-6
        assert store.heads[0, head].kept == pytest.approx(np.mean(shares), abs=1e-5)


def test_bytes_go_to_the_heads_in_which_they_keep_most() -> None:
    """One head reads two keys and the other a bit of all: a small store has the first whole."""
    T = 400
    sharp = torch.zeros(T, T)
    sharp[:, 0], sharp[torch.arange(T), torch.arange(T)] = 0.5, 0.5
    sharp[0, 0] = 1.0
    (spread,), _ = soft_rows(1, T, 0, 0, eps=2.0)
    weights = torch.stack([sharp, spread])
    k = weights.sum(-1)
    large, small = (collected(weights, k, 0, budget, block=T) for budget in (300_000, 30_000))
    assert large.heads[0, 1].kept == pytest.approx(0.99, abs=0.01)
    assert small.heads[0, 0].kept == pytest.approx(1)
    assert small.heads[0, 1].kept < 0.8
    assert len(small.to_bytes()) > 28_000
    alone = collected(weights, k, 0, 30_000, block=T, only=[(0, 1)])
    assert list(alone.heads) == [(0, 1)]
    assert small.heads[0, 1].kept < alone.heads[0, 1].kept, "the other head has its share of the bytes"
    assert len(alone.to_bytes()) <= 30_000


def test_rows_of_a_long_window_are_left_out_where_the_bytes_do_not_reach() -> None:
    """The first queries stay, and the store says how many."""
    weights, k = soft_rows(2, 300, 0, 0)
    store = collected(weights, k, 0, 20_000, block=64)
    assert (store.tokens, store.queries < 300) == (300, True)
    assert len(store.to_bytes()) <= 20_000
    store.row(0, 1, store.queries - 1)
    with pytest.raises(ConfigError, match="no query"):
        store.row(0, 1, store.queries)
    with pytest.raises(ConfigError, match=r"no head 1\.0; its last one is 0\.1"):
        store.row(1, 0, 0)


def test_weights_far_below_one_are_exact_too() -> None:
    """Each row has a scale of its own, so a long row of equal weights loses nothing."""
    T = 3000
    weights, k = torch.zeros(1, T, T), torch.ones(1, T)
    weights[0, :, 0] = 1.0
    weights[0, -1] = 1 / T
    row = collected(weights, k, 0, 400_000, keep=1.0, block=T).row(0, 0, T - 1)
    np.testing.assert_allclose(row.weights, 1 / T, rtol=EXACTNESS)
    assert len(row.keys) > 200
    assert row.rest == pytest.approx(1 - len(row.keys) / T, abs=REST_STEP)


def test_the_thumbnail_has_the_largest_weight_of_each_cell() -> None:
    T, null = 150, 1
    weights = torch.zeros(1, T, null + T)
    weights[..., 0] = 0.5  # of the null key, which has no cell
    weights[0, 149, null + 149] = 1.0
    weights[0, 149, null + 148] = 0.25
    weights[0, 100, null + 7] = 0.25
    cells = collected(weights, torch.ones(1, T), null, 60_000, block=40).thumbnail(0, 0)
    assert cells.shape == (64, 64)
    assert {(int(row), int(column)): int(cells[row, column]) for row, column in np.argwhere(cells)} == {
        (149 * 64 // T, 149 * 64 // T): 255,
        (100 * 64 // T, 7 * 64 // T): round(254 * 0.8),
    }


def test_a_budget_below_all_that_can_be_is_refused() -> None:
    weights, k = soft_rows(2, 12, 0, 0)
    with pytest.raises(ConfigError, match="the rows of 2 heads take 1360 bytes at least"):
        collected(weights, k, 0, 1000)


@settings(max_examples=40)
@given(content=st.binary(max_size=200))
def test_other_bytes_are_no_store(content: bytes) -> None:
    with pytest.raises(DataError, match="no store of rows"):
        RowStore.from_bytes(content)


SIZES = b'"tokens":1,"queries":1,"null_keys":0,"keep":1'


@pytest.mark.parametrize(
    "header", [b"{}", b"5", b"null", b"[" * 20_000, b'{"heads":[5]}', b'{"heads":[],' + SIZES + b"}"]
)
def test_another_header_is_that_of_no_store(header: bytes) -> None:
    with pytest.raises(DataError, match="no store of rows"):
        RowStore.from_bytes(b"CDAROWS\x01" + len(header).to_bytes(4, "little") + header)


@settings(max_examples=20, deadline=None)
@given(place=st.integers(0, 10**6), cut=st.booleans())
def test_a_damaged_store_is_told_in_one_sentence(place: int, cut: bool) -> None:
    """Or it still reads: a byte of a stream may become another weight."""
    content = bytearray(collected(*soft_rows(1, 20, 0, 0), 0, 60_000).to_bytes())
    place %= len(content)
    damaged = content[:place] if cut else content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
    try:
        store = RowStore.from_bytes(bytes(damaged))
        store.row(0, 0, 0)
        store.thumbnail(0, 0)
    except (DataError, ConfigError):
        return
    assert not cut


@settings(max_examples=40)
@given(numbers=st.lists(st.integers(0, 2**32 - 1), max_size=20))
def test_varints_come_back(numbers: list[int]) -> None:
    content = np.frombuffer(to_varints(np.array(numbers, np.int64)) + b"\xff", np.uint8)
    back, used = from_varints(content, len(numbers))
    assert back.tolist() == numbers
    assert used == len(content) - 1


@pytest.mark.parametrize(
    ("size", "count"), [("12MB", 12_000_000), ("1.5kB", 1500), ("7", 7), (9, 9), (" 2 GB", 2 * 10**9)]
)
def test_a_size_is_read(size: str | int, count: int) -> None:
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["", "MB", "12 apples", "-3MB", 0, "0.5"])
def test_what_is_no_size_is_refused(size: str | int) -> None:
    with pytest.raises(ConfigError, match="no size; write a number of bytes"):
        parse_size(size)
