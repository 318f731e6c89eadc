"""Intervals over seeds, and the seeds that a comparison needs."""

from __future__ import annotations

import math

import pytest

from cda_cli.sweep.student_t import mean_of, quantile, seeds_needed


@pytest.mark.parametrize(
    ("probability", "freedom", "expected"),
    [
        (0.975, 1, 12.7062),
        (0.975, 2, 4.3027),
        (0.975, 3, 3.1824),
        (0.8, 4, 0.9410),
        (0.975, 30, 2.0423),
        (0.95, 9, 1.8331),
    ],
)
def test_quantiles_are_those_of_printed_tables(probability: float, freedom: int, expected: float) -> None:
    assert quantile(probability, freedom) == pytest.approx(expected, abs=5e-5)


def test_an_interval_is_that_of_students_own_example() -> None:
    """Student, The Probable Error of a Mean, 1908: hours of sleep that ten patients gained by one drug over another."""
    found = mean_of([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert found.value == pytest.approx(1.58)
    assert found.deviation == pytest.approx(1.2300, abs=1e-4)
    assert (found.low, found.high) == (pytest.approx(0.7001, abs=1e-4), pytest.approx(2.4599, abs=1e-4))


@pytest.mark.parametrize("numbers", [[], [1.5]])
def test_fewer_than_two_seeds_have_no_interval(numbers: list[float]) -> None:
    found = mean_of(numbers)
    assert math.isnan(found.low)
    assert math.isnan(found.deviation)
    assert found.seeds == len(numbers)


def test_seeds_needed_reach_the_power_and_one_less_does_not() -> None:
    for ratio in (0.3, 1.0, 2.5):
        count = seeds_needed(ratio, 1.0)
        assert count is not None

        def reached(pairs: int, ratio: float = ratio) -> bool:
            return pairs >= ((quantile(0.975, pairs - 1) + quantile(0.8, pairs - 1)) * ratio) ** 2

        assert reached(count)
        assert count == 2 or not reached(count - 1)
    assert seeds_needed(100.0, 1.0) is None
