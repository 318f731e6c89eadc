"""Conditions, as of `--fail-if`: what they name, what they refuse, and when they fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.conditions import COMPARISONS, check_conditions, metrics_of, parse_condition, require
from cda_cli.errors import CheckFailedError, ConfigError

DOCUMENT: dict[str, Any] = {
    "loss": 1.5,
    "loss_interval": [1.4, 1.6],
    "checkpoint": "runs/loss > 2",
    "per_document": True,
    "cuts": [{"name": "top[32]", "difference": 0.02, "difference_interval": [math.nan, None]}],
    "checkpoints": [{"loss": 1}, {"loss": 2, "cuts": [{"name": "top[1]", "keys": 1}]}],
    "resampled": {"number": 40},
    "tasks": {"task:sort?length=8": {"metrics": {"acc,none": 0.5}}},
}


def test_every_number_has_a_name_and_nothing_else() -> None:
    metrics = metrics_of(DOCUMENT)
    missing = {name for name, value in metrics.items() if math.isnan(value)}
    assert missing == {"top[32].difference_lo", "top[32].difference_hi"}
    assert {name: value for name, value in metrics.items() if name not in missing} == {
        "loss": 1.5, "loss_lo": 1.4, "loss_hi": 1.6, "top[32].difference": 0.02, "checkpoints[0].loss": 1,
        "checkpoints[1].loss": 2, "checkpoints[1].top[1].keys": 1, "resampled.number": 40,
        "tasks.task:sort?length=8.metrics.acc,none": 0.5,
    }  # fmt: skip


@given(st.floats(-9, 9), st.floats(-9, 9), st.sampled_from(sorted(COMPARISONS)), st.sampled_from(["", " "]))
def test_a_condition_compares_as_python_does(left: float, right: float, comparison: str, space: str) -> None:
    condition = parse_condition(f"left{space}{comparison}{space}{right!r}")
    assert condition.holds({"left": left}) == COMPARISONS[comparison](left, right)
    between = parse_condition(f"left{space}{comparison}{space}right")
    assert between.holds({"left": left, "right": right}) == COMPARISONS[comparison](left, right)


def test_what_holds_fails_with_its_metrics() -> None:
    check_conditions([parse_condition("loss > 2"), parse_condition("top[32].difference<0")], DOCUMENT)
    check_conditions([parse_condition("tasks.task:sort?length=8.metrics.acc,none<=0.4")], DOCUMENT)
    with pytest.raises(CheckFailedError, match=r"loss_hi > 1\.5 and 1 < loss: loss_hi is 1\.6, loss is 1\.5") as failed:
        check_conditions([parse_condition(text) for text in ("loss_hi > 1.5", "loss > 2", "1 < loss")], DOCUMENT)
    assert failed.value.exit_code == 3


def test_what_is_required_must_hold() -> None:
    require(parse_condition("loss < 2"), DOCUMENT)
    with pytest.raises(CheckFailedError, match=r"^loss_hi < loss does not hold: loss_hi is 1\.6, loss is 1\.5$"):
        require(parse_condition("loss_hi < loss"), DOCUMENT)
    with pytest.raises(CheckFailedError, match="has no value here"):
        require(parse_condition("top[32].difference_hi < 9"), DOCUMENT)


def test_a_metric_without_a_value_passes_no_condition() -> None:
    """Every comparison with NaN is false, so the check would pass unseen."""
    with pytest.raises(CheckFailedError, match="has no value here"):
        check_conditions([parse_condition("top[32].difference_hi > 0.01")], DOCUMENT)


def test_an_unknown_metric_is_refused_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'top\[32\]\.difference'"):
        check_conditions([parse_condition("top[3].difference > 0.01")], DOCUMENT)


@pytest.mark.parametrize(
    "text",
    ["", "loss", "loss >", "> 2", "1 > 2", "loss = 2", "loss > 2 > 1", "loss > 2 or 1", "loss =< 2", "a b > 1",
     "__import__('os') > 1 and exit()"],
)  # fmt: skip
def test_what_is_no_condition_is_refused(text: str) -> None:
    """Nothing of it is run."""
    with pytest.raises(ConfigError, match="no condition"):
        parse_condition(text)
