"""Errors and bootstrap intervals of ratios, against what they mean written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.evaluation import Comparison, Sums, windows_as_units
from cda_cli.evaluation.intervals import (
    RESAMPLES,
    SEED,
    Bootstrap,
    Units,
    influence,
    influence_error,
    ratio_error,
    stretches_as_units,
)


def sums_of(nats: Tensor, tokens: Tensor, text_bytes: Tensor) -> Sums:
    return Sums(nats, tokens, text_bytes, torch.empty(len(nats), 0))


def drawn(windows: int, seed: int, shift: float = 0.0) -> Sums:
    generator = np.random.default_rng(seed)
    tokens = torch.from_numpy(generator.integers(1, 9, windows))
    nats = tokens * torch.from_numpy(2 + shift + generator.normal(0, 0.3, windows))
    return sums_of(nats, tokens, 2 * tokens)


def alone(units: int) -> Units:
    return Units(torch.arange(units), "documents")


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(0, 99))
def test_the_error_of_a_figure_is_that_of_its_influences(windows: int, seed: int) -> None:
    sums = drawn(windows, seed)
    error = influence_error(influence(sums.nats, sums.tokens))
    assert error == pytest.approx(ratio_error(sums.nats, sums.tokens), nan_ok=True)


def test_the_interval_is_that_of_resampled_observations() -> None:
    """Each resample draws as many observations as there are, and a figure is a ratio of the sums of those drawn."""
    sums = drawn(25, seed=1)
    generator = np.random.default_rng(SEED)
    nats, tokens = sums.nats.numpy(), sums.tokens.numpy()
    each = []
    for _ in range(RESAMPLES):
        chosen = generator.integers(0, 25, 25)
        each.append(nats[chosen].sum() / tokens[chosen].sum())
    found = Comparison([sums], alone(25)).loss()
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(each, [0.025, 0.975])))
    assert found.value == pytest.approx(nats.sum() / tokens.sum())


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Of 200 texts of 40 observations the interval misses 2.0 in 10 on average; more than 25 would be a fault."""
    missed = 0
    for seed in range(200):
        found = Comparison([drawn(40, seed)], alone(40)).loss()
        missed += not found.low <= 2 <= found.high
    assert 2 <= missed <= 25


@settings(max_examples=20)
@given(st.integers(2, 60), st.integers(0, 99))
def test_a_way_against_itself_differs_by_nothing(windows: int, seed: int) -> None:
    sums = drawn(windows, seed)
    found = Comparison([sums, sums], alone(windows)).difference(1)
    assert found == (0, 0, 0, 0)


def test_what_both_ways_share_leaves_no_error() -> None:
    """Texts differ by far more than the ways do: only a paired interval sees that one is better."""
    sums = drawn(40, seed=3)
    better = sums_of(sums.nats - 0.01 * sums.tokens.double(), sums.tokens, sums.text_bytes)
    comparison = Comparison([sums, better], alone(40))
    found = comparison.difference(1)
    assert found[:1] + found[2:] == pytest.approx([-0.01 / math.log(2) / 2] * 3)
    assert found.error == pytest.approx(0, abs=1e-12)
    mine, theirs = comparison.bits_per_byte(1), comparison.bits_per_byte(0)
    assert mine.high > theirs.low, "apart, the two intervals overlap"


def test_the_error_of_a_difference_is_that_of_the_mean_of_differences() -> None:
    """Where all observations are of equal size."""
    one, other = (sums_of(drawn(30, seed).nats, torch.full((30,), 4), torch.full((30,), 8)) for seed in (0, 1))
    each: Tensor = (other.nats - one.nats) / math.log(2) / 8
    found = Comparison([one, other], alone(30)).difference(1)
    assert found.value == pytest.approx(each.mean().item())
    assert found.error == pytest.approx(each.std().item() / math.sqrt(30))


def test_windows_are_resampled_in_blocks() -> None:
    """A text that wanders has neighbours that are alike, so windows drawn one by one promise too much."""
    steps = np.random.default_rng(0).normal(0, 0.1, 1000)
    level = torch.from_numpy(2 + np.cumsum(steps) - np.linspace(0, np.cumsum(steps)[-1], 1000))
    sums = sums_of(10 * level, torch.full((1000,), 10), torch.full((1000,), 10))
    units = windows_as_units(1000)
    assert (units.block, units.blocks, units.resampled) == (10, 100, "blocks of 10 windows")
    in_blocks, one_by_one = Comparison([sums], units).loss(), Comparison([sums], alone(1000)).loss()
    assert in_blocks.high - in_blocks.low > 2 * (one_by_one.high - one_by_one.low)


@pytest.mark.parametrize("windows", range(1, 30))
def test_every_window_is_in_a_block(windows: int) -> None:
    ones = torch.ones(windows, 1, dtype=torch.float64)
    units = windows_as_units(windows)
    totals = Bootstrap(ones, units.block).totals
    assert len(totals) == (RESAMPLES if units.blocks > 1 else 0)
    if units.blocks > 1:
        assert totals.mean() == pytest.approx(windows, rel=0.1)


def test_a_single_observation_has_no_interval() -> None:
    found = Comparison([drawn(1, 0)], windows_as_units(1)).loss()
    assert all(map(math.isnan, found[1:]))
    early = torch.tensor([5.0, 0.0, 0.0])  # with a stride, only the first window predicts from little
    assert math.isnan(ratio_error(early, (early > 0).double()))


def test_overlapping_windows_make_one_observation_together() -> None:
    """With a stride of a quarter of the context, four windows in a row see the same text."""
    sums = drawn(10, 0)
    units = windows_as_units(10, together=4)
    assert units.of_window.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    whole = sums.over(units.of_window)
    assert whole.tokens.tolist() == [sums.tokens[:4].sum(), sums.tokens[4:8].sum(), sums.tokens[8:].sum()]
    found = Comparison([sums], units).evaluation()
    assert found.windows == 10
    assert found.standard_error == pytest.approx(ratio_error(whole.nats, whole.tokens))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(1, 7))
def test_stretches_are_the_same_text_in_windows_of_any_length(sizes: list[int], merged: int) -> None:
    """Windows of one reading, and the same merged: a stretch begins in both within a window of the same byte."""
    few = [sum(sizes[start : start + merged]) for start in range(0, len(sizes), merged)]
    readings = [torch.tensor(sizes), torch.tensor(few)]
    units = stretches_as_units(readings)
    assert units[0].count == units[1].count
    begins = []
    for each, of_windows in zip(units, readings, strict=True):
        assert set(each.of_window.tolist()) == set(range(each.count)), "a stretch without a window has no figure"
        first = torch.searchsorted(each.of_window, torch.arange(each.count))
        begins.append((of_windows.cumsum(0) - of_windows)[first])
    assert (begins[0] - begins[1]).abs().max() <= max(few)


def test_a_difference_of_unlike_windows_has_the_error_of_like_ones() -> None:
    """What one reading counts to the next stretch is little, so pairing still removes what the text adds to both."""
    generator = np.random.default_rng(0)
    fine = torch.from_numpy(np.repeat(generator.normal(2, 0.5, 100), 16)) * 10  # nats of windows of 10 bytes
    readings = [sums_of(fine, torch.full((1600,), 10), torch.full((1600,), 10))]
    coarse = (fine * 1.01).unflatten(0, (800, 2)).sum(1)
    readings.append(sums_of(coarse, torch.full((800,), 5), torch.full((800,), 20)))
    units = stretches_as_units([each.text_bytes for each in readings])
    assert units[0].count == 100
    found = Comparison(readings, units)
    difference = found.difference(1)
    assert difference.value == pytest.approx(0.01 * found.evaluation().bits_per_byte)
    assert difference.low <= difference.value <= difference.high
    assert difference.error < 0.1 * found.evaluation().bits_per_byte_error
