"""Alarms for heads that have stopped to select, by rows whose figures are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.inspection import RecordWatcher, effective_support, inspect
from cda_cli.inspection.alarms import fewest_keys, head_alarms
from cda_cli.inspection.measures import RECORDED
from tests.inspection.rows import seen_rows, shifted, uniform
from tests.inspection.test_inspection import CPU, batches, build

T = 64


def state_of(weights: Tensor, k: float = 1.0, null: int = 0) -> str | None:
    """What is said of a head with these rows [T, S]."""
    rows = seen_rows(weights, k, null)
    means = {name: measure(rows).nanmean().view(1, 1).nan_to_num(0.0) for name, measure in RECORDED.items()}
    alarms = head_alarms(means, len(weights), null)
    assert [(alarm.layer, alarm.head) for alarm in alarms] == [(0, 0)] * len(alarms)
    return alarms[0].state if alarms else None


def first(T: int) -> Tensor:
    """Rows [T, T] that read only the first key."""
    return torch.eye(T)[:1].expand(T, T)


def test_a_head_on_one_key_has_collapsed() -> None:
    assert state_of(shifted(T, 1)) == "collapsed"
    assert state_of(torch.eye(T)) == "collapsed"
    assert state_of(0.995 * shifted(T, 1) + 0.005 * shifted(T, 3)) == "collapsed"
    assert state_of(0.95 * shifted(T, 1) + 0.05 * shifted(T, 3)) is None, "5 % elsewhere still move its scores"


def test_two_capped_keys_of_k_2_are_a_collapse_too() -> None:
    """No key can have more than half of the mass then."""
    capped = shifted(T, 1) + shifted(T, 4)
    assert state_of(capped, 2.0) == "collapsed"
    assert state_of(0.8 * capped + 0.2 * (shifted(T, 2) + shifted(T, 6)), 2.0) is None


def test_a_head_on_a_null_key_has_collapsed() -> None:
    only_null = torch.zeros(T, T + 1)
    only_null[:, 0] = 1
    assert state_of(only_null, null=1) == "collapsed"


def test_a_head_on_the_first_key_rests_on_a_sink() -> None:
    assert state_of(first(T)) == "sink"
    assert state_of(0.96 * first(T) + 0.04 * torch.eye(T)) == "sink"
    assert state_of(0.9 * first(T) + 0.1 * torch.eye(T)) is None


@pytest.mark.parametrize("null", [0, 2])
def test_a_head_on_all_keys_alike_is_spread(null: int) -> None:
    assert state_of(uniform(T, null), null=null) == "spread"
    most = uniform(T, null) * (torch.rand(T, T + null, generator=torch.Generator().manual_seed(0)) < 0.8)
    most[:, 0] = 1e-6
    assert state_of(most, null=null) is None, "four fifths of the keys are a choice"


@pytest.mark.parametrize(("length", "k"), [(1, 1.0), (6, 1.0), (T, 9.0), (T, 99.0)])
def test_rows_without_a_choice_raise_no_alarm(length: int, k: float) -> None:
    """Where k is more than a quarter of the keys that a row sees, many rows must read all of them."""
    weights = uniform(length) * torch.arange(1.0, length + 1).clamp(max=k).unsqueeze(1)
    assert state_of(weights, k) is None


@given(k=st.floats(0.5, 40))
def test_the_fewest_keys_of_a_budget_are_capped_ones_and_a_rest(k: float) -> None:
    row = torch.tensor([1.0] * math.floor(k) + [k - math.floor(k)], dtype=torch.float64)
    assert fewest_keys(k) == pytest.approx(effective_support(row).item())


def test_alarms_come_with_the_records_of_the_same_pass() -> None:
    """At a temperature so high that all scores are equal, all heads of all layers are spread."""
    watcher = RecordWatcher()
    inspect(build(attn_eps=1e6, attn_k=1.0), batches(7), CPU, torch.float32, watcher)
    layers, alarms = watcher.recorded()
    assert layers == watcher.recorded().layers
    assert [(alarm.layer, alarm.head, alarm.state) for alarm in alarms] == [
        (layer, head, "spread") for layer in range(2) for head in range(2)
    ]
