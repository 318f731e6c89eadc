"""Each promise is tried a few times; `make reliability` tries it many times. Each experiment fails on broken code."""

from __future__ import annotations

import pytest

from tests.reliability.experiments import EXPERIMENTS
from tests.reliability.harness import Sum, results, upper_bound
from tests.reliability.variants import VARIANTS

SEED = 0


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_promise_holds(name: str) -> None:
    experiment = EXPERIMENTS[name]
    failures = [one for one in results(experiment.trials, experiment.reduced, SEED) if one is not None]
    assert not failures, failures[0]


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name, one in EXPERIMENTS.items() for variant in one.variants]
)
def test_what_is_broken_is_caught(name: str, variant: str) -> None:
    """An experiment that holds whatever the product does shows nothing."""
    experiment = EXPERIMENTS[name]
    failures = (one for one in results(experiment.trials, experiment.full, SEED, variant) if one is not None)
    first = next(failures, None)
    assert first is not None, f"{name} holds with a product in which: {variant}"
    assert not first.startswith("Traceback"), f"the experiment itself failed: {first}"


def test_every_variant_is_used() -> None:
    assert set(VARIANTS) == {variant for experiment in EXPERIMENTS.values() for variant in experiment.variants}


@pytest.mark.parametrize(
    ("tried", "failed", "bound"),
    # 1 − 0.05^(1/n) where none failed; the others from tables of the beta distribution.
    [(200, 0, 0.014867), (10_000, 0, 0.00029953), (1, 0, 0.95), (100, 1, 0.046560), (10, 2, 0.506901), (3, 3, 1.0)],
)
def test_the_bound_is_that_of_the_binomial_distribution(tried: int, failed: int, bound: float) -> None:
    assert upper_bound(tried, failed) == pytest.approx(bound, rel=1e-4)


def test_a_sum_keeps_the_first_failure() -> None:
    total = Sum()
    for one in (None, "first", None, "second"):
        total.add(one)
    assert (total.tried, total.failed, total.first) == (4, 2, "first")
