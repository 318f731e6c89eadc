"""The sparsity measures against loops over their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.inspection import effective_support
from cda_cli.inspection.measures import CAPPED_WEIGHT, VISIBLE_WEIGHT, HeadSums, count_active_units, sum_head_measures
from cda_cli.model.observe import ObservedAttention


@given(m=st.integers(1, 40), others=st.integers(0, 40), weight=st.floats(1e-6, 1))
def test_the_support_of_m_equal_weights_is_m(m: int, others: int, weight: float) -> None:
    """Whatever they sum to, and however many zeros stand beside them."""
    row = torch.cat((torch.full((m,), weight), torch.zeros(others)))
    row = row[torch.randperm(len(row), generator=torch.Generator().manual_seed(m))]
    assert effective_support(row).item() == pytest.approx(m, rel=1e-4)


def test_the_support_of_one_weight_is_1_and_of_none_0() -> None:
    rows = torch.stack((torch.eye(7)[3], torch.zeros(7), torch.full((7,), 1e-30), torch.eye(7)[0] * 1e-9))
    torch.testing.assert_close(effective_support(rows), torch.tensor([1.0, 0.0, 7.0, 1.0]), atol=1e-5, rtol=0)
    assert effective_support(torch.rand(2, 3, 4, 5)).shape == (2, 3, 4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda row: sum(row) > 1e-3))
def test_the_support_is_the_exponential_of_the_entropy(row: list[float]) -> None:
    shares = [weight / math.fsum(row) for weight in row]
    expected = math.exp(-math.fsum(share * math.log(share) for share in shares if share > 0))
    assert effective_support(torch.tensor(row, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9)


def random_seen(B: int, H: int, T: int, null: int, seed: int) -> ObservedAttention:
    """Returns causal weights, of which some are capped, tiny or 0. The k of a row may exceed the number of its keys."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(B, H, T, null + T, generator=generator)
    kinds = torch.randint(4, weights.shape, generator=generator)
    weights = torch.where(kinds == 0, 1.0, torch.where(kinds == 1, weights * 1e-3, weights))
    weights = torch.where(kinds == 3, 0.0, weights).tril(null)
    return ObservedAttention(0, weights, 0.5 + 4 * torch.rand(B, H, T, generator=generator), null, 0)


def looped(seen: ObservedAttention) -> dict[str, list[float]]:
    """Computes what `sum_head_measures` returns, entry by entry."""
    B, H, T, _ = seen.weights.shape
    null = seen.null_keys
    sums = {name: [0.0] * H for name in HeadSums._fields}
    for b in range(B):
        for h in range(H):
            for t in range(T):
                k = seen.sparsity_k[b, h, t].item()
                row = [seen.weights[b, h, t, s].item() for s in range(null + t + 1)]
                real = row[null:]
                shares = [weight / sum(row) for weight in row if weight > 0] if sum(row) else []
                measures = {
                    "rows": 1,
                    "row_sum": sum(row),
                    "sparsity_k": k,
                    "excess": abs(sum(row) - min(k, len(row))),
                    "support": math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0,
                    "attended": sum(weight > VISIBLE_WEIGHT for weight in row),
                    "bounded_rows": len(row) > k,
                    "capped_share": sum(weight >= CAPPED_WEIGHT for weight in row) / k if len(row) > k else 0,
                    "distance": sum((t - s) * w for s, w in enumerate(real)) / sum(real) if sum(real) else 0,
                }
                for name, value in measures.items():
                    sums[name][h] += value
    return sums


def listed(sums: HeadSums) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in sums._asdict().items()}


@pytest.mark.parametrize("null", [0, 1, 3])
@pytest.mark.parametrize(("B", "H", "T"), [(1, 1, 1), (2, 3, 7), (1, 2, 12)])
def test_the_sums_are_those_of_a_loop(B: int, H: int, T: int, null: int) -> None:
    for seed in range(3):
        seen = random_seen(B, H, T, null, seed)
        found, expected = listed(sum_head_measures(seen)), looped(seen)
        for name in HeadSums._fields:
            assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), f"{name} is not what it says"


@pytest.mark.parametrize("null", [0, 2])
@pytest.mark.parametrize("rows", [1, 3, 11])
def test_sums_of_parts_are_those_of_all_rows(rows: int, null: int) -> None:
    """A part knows the positions of its rows, and so what they see and how far back they look."""
    seen = random_seen(2, 3, 12, null, seed=0)
    expected = listed(sum_head_measures(seen))
    parts = [
        sum_head_measures(ObservedAttention(0, weights, k, null, first))
        for first, weights, k in zip(
            range(0, 12, rows), seen.weights.split(rows, 2), seen.sparsity_k.split(rows, 2), strict=True
        )
    ]
    for name, values in listed(sum(parts[1:], start=parts[0])).items():
        assert values == pytest.approx(expected[name]), name


def test_sums_of_two_passes_are_those_of_one() -> None:
    one, other = random_seen(2, 3, 6, 1, 0), random_seen(4, 3, 6, 1, 1)
    weights, k = (torch.cat(pair) for pair in zip(one[1:3], other[1:3], strict=True))
    both = ObservedAttention(0, weights, k, 1, 0)
    for name, values in listed(sum_head_measures(one) + sum_head_measures(other)).items():
        assert values == pytest.approx(listed(sum_head_measures(both))[name])
    activations = torch.randn(6, 5, 9, generator=torch.Generator().manual_seed(0))
    first, second, together = map(count_active_units, (activations[:2], activations[2:], activations))
    halves = first + second
    assert halves.tokens == together.tokens
    assert torch.equal(halves.times_active, together.times_active)


def seen_of(rows: list[list[float]], k: float) -> ObservedAttention:
    weights: Tensor = torch.tensor(rows)[None, None]
    return ObservedAttention(0, weights, torch.full((1, 1, len(rows)), k), weights.shape[-1] - len(rows), 0)


def test_the_distance_leaves_null_keys_out() -> None:
    """Null keys have no position. If they counted, they would seem far back or near, whatever a head does."""
    sums = sum_head_measures(seen_of([[0.9, 0.1, 0, 0], [0.5, 0.5, 0.0, 0], [0.2, 0.2, 0.4, 0.2]], k=1.0))
    assert sums.distance.item() == pytest.approx(0 + 1 + (2 * 0.2 + 0.4) / 0.8)


def test_rows_that_see_no_more_than_k_do_not_count_as_capped() -> None:
    """Such a row caps every entry, whatever the model does."""
    sums = sum_head_measures(seen_of([[1.0, 0, 0, 0], [1.0, 1.0, 0, 0], [1.0, 1.0, 0, 0], [1.0, 0.5, 0.5, 0]], k=2.0))
    assert sums.bounded_rows.item() == 2
    assert sums.capped_share.item() == pytest.approx(2 / 2 + 1 / 2)


def test_units_are_active_by_their_size_and_dead_where_never() -> None:
    activations = torch.tensor([[[2e-3, 0.0, -0.5, 1e-4], [0.0, 0.0, -2e-3, 0.0]], [[1.0, 1e-3, 0.1, 0.0]] * 2])
    counts = count_active_units(activations)
    assert counts.tokens == 4
    assert counts.times_active.tolist() == [3, 0, 4, 0]
