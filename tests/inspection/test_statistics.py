"""Sums over blocks of rows give the means and quantiles of all rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.inspection.statistics import Histogram, RowMeans, doubling_range, range_ends


@given(st.integers(0, 10**6))
def test_a_number_is_in_its_range(number: int) -> None:
    first, last = range_ends(int(doubling_range(torch.tensor([number]))))
    assert first <= number <= last
    assert last < 2 * max(1, first)


def test_means_of_blocks_are_those_of_all_rows() -> None:
    values = torch.rand(2, 3, 4, 21, dtype=torch.float64)
    values[0, 1, :, 5] = torch.nan
    values[1, :, 2] = torch.nan
    means = RowMeans()
    for first in range(0, 21, 4):
        block = values[..., first : first + 4]
        means.add(block, first + torch.arange(block.shape[-1]))
    torch.testing.assert_close(means.mean(), values.nanmean((1, 3)), equal_nan=True)
    by_position = means.by_position()
    assert by_position.shape == (2, 4, 6)
    torch.testing.assert_close(by_position[..., 3], values[..., 4:8].nanmean((1, 3)), equal_nan=True)


@given(st.lists(st.floats(0.01, 1e4), min_size=1, max_size=50), st.sampled_from([0.05, 0.5, 0.95]))
def test_a_quantile_is_exact_to_half_a_step(figures: list[float], share: float) -> None:
    histogram = Histogram()
    for figure in figures:
        histogram.add(torch.tensor([[[figure]]], dtype=torch.float64))
    expected = sorted(figures)[max(0, -int(-share * len(figures) // 1) - 1)]
    assert histogram.quantile(share).item() == pytest.approx(expected, rel=0.006)


def test_whole_numbers_stay_whole() -> None:
    for number in range(1, 90):
        histogram = Histogram(whole=True)
        histogram.add(torch.full((1, 2, 3), float(number), dtype=torch.float64))
        assert histogram.quantile(0.5).tolist() == [number, number]


def test_the_share_at_a_limit() -> None:
    histogram = Histogram()
    histogram.add(torch.tensor([[[1.0, 1.001, 1.5, 3.0]]], dtype=torch.float64))
    assert histogram.share_at(1.0).item() == 0.5
    assert histogram.share_at(3.0).item() == 0.25
    assert histogram.share_at(2.0).item() == 0
