"""Each measure on rows whose figures are known in closed form, and against a loop over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.inspection import effective_support
from cda_cli.inspection.measures import MEASURES
from cda_cli.inspection.patterns import Distances, Sinks, by_distance, median_distance
from cda_cli.inspection.seen_rows import CAPPED_WEIGHT, SeenRows
from tests.inspection.rows import DIM, WIDTH, figures, random_weights, seen_rows, shifted, uniform

T = 40


@given(m=st.integers(1, 40), others=st.integers(0, 40), weight=st.floats(1e-6, 1))
def test_the_support_of_m_equal_weights_is_m(m: int, others: int, weight: float) -> None:
    """Whatever they sum to, and however many zeros stand beside them."""
    row = torch.cat((torch.full((m,), weight), torch.zeros(others)))
    row = row[torch.randperm(len(row), generator=torch.Generator().manual_seed(m))]
    assert effective_support(row).item() == pytest.approx(m, rel=1e-4)
    rows = seen_rows(row[None], k=m * weight, position=len(row) - 1)
    for name in ("effective_support", "participation"):
        assert figures(rows, name) == pytest.approx([m], rel=1e-4)
    assert figures(rows, "keys_95") == [math.ceil(0.95 * m - 1e-4)]
    for keys in (1, 4, 16, 64):
        assert figures(rows, f"rest_{keys}") == pytest.approx([max(0, 1 - keys / m)], abs=1e-5)


@pytest.mark.parametrize("most", [200, 600])
def test_keys_that_hold_the_mass_are_found_among_many(most: int) -> None:
    """Whether a few keys hold it in all rows, or in some only."""
    rows = torch.stack([torch.cat((torch.ones(m), torch.zeros(700 - m))) / m for m in (1, 100, most)])
    found = seen_rows(rows[:, torch.randperm(700, generator=torch.Generator().manual_seed(0))], position=699)
    assert figures(found, "keys_95") == [1, 95, 0.95 * most]
    assert figures(found, "rest_64") == pytest.approx([0, 0.36, 1 - 64 / most], abs=1e-5)


def test_the_support_of_one_weight_is_1_and_of_none_0() -> None:
    rows = torch.stack((torch.eye(7)[3], torch.zeros(7), torch.full((7,), 1e-30), torch.eye(7)[0] * 1e-9))
    torch.testing.assert_close(effective_support(rows), torch.tensor([1.0, 0.0, 7.0, 1.0]), atol=1e-5, rtol=0)
    assert effective_support(torch.rand(2, 3, 4, 5)).shape == (2, 3, 4)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda row: sum(row) > 1e-3))
def test_the_support_is_the_exponential_of_the_entropy(row: list[float]) -> None:
    shares = [weight / math.fsum(row) for weight in row]
    expected = math.exp(-math.fsum(share * math.log(share) for share in shares if share > 0))
    assert effective_support(torch.tensor(row, dtype=torch.float64)).item() == pytest.approx(expected, rel=1e-9)


def looped(rows: SeenRows) -> dict[str, list[float]]:
    """Computes the figures of the first head of the first sequence, entry by entry."""
    seen, found = rows.seen, {name: [] for name in MEASURES}
    heads = seen.weights.shape[1]
    assert rows.tokens is not None
    tokens = rows.tokens[0].tolist()
    for row in range(seen.weights.shape[2]):
        t, k, null = seen.position + row, seen.sparsity_k[0, 0, row].item(), seen.null_keys
        every = [[seen.weights[0, h, row, s].item() for s in range(null + t + 1)] for h in range(heads)]
        shares = [[weight / sum(head) if sum(head) else 0.0 for weight in head] for head in every]
        weights, p = every[0], shares[0]
        real, ordered = p[null:], sorted(p, reverse=True)
        mean = [sum(column) / heads for column in zip(*shares, strict=True)]
        capped = sum(weight >= CAPPED_WEIGHT for weight in weights)
        bounded = len(weights) > k
        values = seen.values[0, 0, :, 0].tolist()
        measures: dict[str, float] = {
            "sparsity_k": k,
            "row_sum": sum(weights),
            "row_sum_error": abs(sum(weights) - min(k, len(weights))),
            "capped_share": capped / k if bounded else math.nan,
            "gate_equivalent": float(capped == 0) if bounded else math.nan,
            "effective_support": math.exp(-sum(share * math.log(share) for share in p if share)) if sum(p) else 0,
            "participation": 1 / sum(share**2 for share in p) if sum(p) else 0,
            "keys_95": next((n for n in range(1, len(p)) if sum(ordered[:n]) >= 0.95 - 1e-6), len(p)),
            **{f"rest_{n}": max(0, 1 - sum(ordered[:n])) for n in (1, 4, 16, 64)},
            "null_share": sum(p[:null]),
            "distance_back": sum((t - s) * share for s, share in enumerate(real)) / sum(real)
            if sum(real)
            else math.nan,
            "self_share": real[t],
            "previous_share": real[t - 1] if t else 0,
            "first_share": real[0],
            "duplicate_share": sum(share for s, share in enumerate(real[:t]) if tokens[s] == tokens[t]),
            "induction_share": sum(share for s, share in enumerate(real) if s and tokens[s - 1] == tokens[t]),
            "divergence": sum(share * math.log2(share / m) for share, m in zip(p, mean, strict=True) if share),
            # W_O keeps WIDTH of the DIM numbers of a value, which are all alike.
            "moved_norm": sum(weight * value for weight, value in zip(weights, values, strict=False)) * WIDTH**0.5,
            "written_norm": sum(weight * value for weight, value in zip(weights, values, strict=False)) * WIDTH**0.5,
        }
        assert WIDTH < DIM
        for name, value in measures.items():
            found[name].append(value)
    return found


@pytest.mark.parametrize("null", [0, 2])
@pytest.mark.parametrize(("B", "H", "size"), [(1, 1, 1), (2, 3, 7), (1, 2, 24)])
def test_every_measure_is_that_of_a_loop(B: int, H: int, size: int, null: int) -> None:
    for seed in range(3):
        weights, k = random_weights(B, H, size, null, seed)
        tokens = torch.randint(3, (B, size), generator=torch.Generator().manual_seed(seed))
        rows = seen_rows(weights, k, null, tokens)
        for name, expected in looped(rows).items():
            if any(weights[0, 0].sum(-1) == 0) and name in {"keys_95", "rest_1", "rest_4", "rest_16", "rest_64"}:
                continue  # Nothing is the largest in a row of zeros.
            assert figures(rows, name) == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize("name", MEASURES)
def test_a_block_of_rows_has_the_figures_of_those_rows(name: str) -> None:
    weights, k = random_weights(2, 3, 12, 1, 0)
    tokens = torch.randint(3, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = MEASURES[name](seen_rows(weights, k, 1, tokens))
    parts = [
        MEASURES[name](seen_rows(weights[:, :, first : first + 5], k[:, :, first : first + 5], 1, tokens, first))
        for first in (0, 5, 10)
    ]
    torch.testing.assert_close(torch.cat(parts, -1), whole, equal_nan=True, msg=f"{name} depends on the block")


def test_a_head_that_reads_one_key() -> None:
    rows = seen_rows(shifted(T, 1))
    for name in ("effective_support", "participation", "keys_95"):
        assert figures(rows, name) == pytest.approx([1] * T)
    assert figures(rows, "rest_1") == pytest.approx([0] * T, abs=1e-7)
    assert figures(rows, "distance_back") == [0] + [1] * (T - 1)
    assert figures(rows, "previous_share") == [0] + [1] * (T - 1)


def test_rows_that_see_no_more_than_k_say_nothing_of_caps() -> None:
    """Such a row caps every entry, whatever the model does."""
    rows = seen_rows(torch.tensor([[1.0, 0, 0, 0], [1.0, 1, 0, 0], [1.0, 1, 0, 0], [0.9, 0.5, 0.5, 0.1]]), k=2.0)
    assert figures(rows, "capped_share") == pytest.approx([math.nan, math.nan, 1, 0], nan_ok=True)
    assert figures(rows, "gate_equivalent") == pytest.approx([math.nan, math.nan, 0, 1], nan_ok=True)


def test_null_keys_have_no_position() -> None:
    """If they counted, they would seem far back or near, whatever a head does."""
    rows = seen_rows(torch.tensor([[0.9, 0.1, 0, 0], [0.5, 0.5, 0.0, 0], [0.2, 0.2, 0.4, 0.2]]), null=1)
    assert figures(rows, "distance_back") == pytest.approx([0, 1, (2 * 0.2 + 0.4) / 0.8])
    assert figures(rows, "null_share") == pytest.approx([0.9, 0.5, 0.2])
    only_null = seen_rows(torch.tensor([[1.0, 0]]), null=1)
    assert math.isnan(figures(only_null, "distance_back")[0])


def test_heads_that_read_alike_agree_and_others_do_not() -> None:
    alike = seen_rows(torch.stack((uniform(T), uniform(T)))[None])
    rounding = T * 2**-24 * math.log2(T)  # of T float32 shares, each with its surprise
    assert figures(alike, "divergence") == pytest.approx([0] * T, abs=rounding)
    apart = seen_rows(torch.stack([shifted(T, back) for back in range(4)])[None])
    late = MEASURES["divergence"](apart)[0, :, 3:]
    torch.testing.assert_close(late, torch.full_like(late, 2.0), msg="four heads with no common key are log₂ 4 apart")


def test_what_moves_may_cancel() -> None:
    """Two keys with opposite values move much and add nothing."""
    rows = seen_rows(torch.tensor([[0.5, 0.5]]), position=1)
    values = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1).expand(1, 1, 2, DIM)
    scaled = rows.seen._replace(values=values, output_scale=torch.full((1, 1, 1), 3.0))
    assert figures(SeenRows(scaled), "moved_norm") == pytest.approx([3 * WIDTH**0.5])
    assert figures(SeenRows(scaled), "written_norm") == pytest.approx([0], abs=1e-6)


@given(size=st.integers(1, 20), first=st.integers(0, 19), block=st.integers(1, 20))
def test_sums_by_distance(size: int, first: int, block: int) -> None:
    first, block = first % size, min(block, size - first % size)
    values = torch.rand(2, size, size, generator=torch.Generator().manual_seed(size)).tril()
    found = by_distance(values[:, first : first + block], first)
    expected = torch.zeros(2, size, dtype=torch.float64)
    for t in range(first, first + block):
        for s in range(t + 1):
            expected[:, t - s] += values[:, t, s]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def lifts(
    weights: Tensor, tokens: Tensor | None = None, null: int = 0, visible: Tensor | None = None
) -> dict[str, float]:
    """How often the mass by chance each pattern has, of one head."""
    rows, distances = seen_rows(weights, null=null, tokens=tokens, visible=visible), Distances()
    distances.add(rows)
    chances = {name: chance.item() for name, chance in distances.chances().items()}
    totals = {name: MEASURES[f"{name}_share"](rows).sum().item() for name in chances}
    return {name: totals[name] / chances[name] for name in chances if chances[name]}


@pytest.mark.parametrize("null", [0, 3])
def test_equal_weights_have_what_chance_gives(null: int) -> None:
    """A lift of 1. Tokens that are all alike make every key a duplicate."""
    found = lifts(uniform(T, null), torch.zeros(1, T, dtype=torch.long), null)
    assert found == pytest.approx(dict.fromkeys(("self", "previous", "first", "duplicate", "induction"), 1), rel=1e-5)


def test_equal_weights_over_text_have_about_what_chance_gives() -> None:
    tokens = torch.randint(20, (16, 200), generator=torch.Generator().manual_seed(0))
    found = lifts(uniform(200).expand(16, 1, -1, -1), tokens)
    assert found["duplicate"] == pytest.approx(1, abs=0.1)
    assert found["induction"] == pytest.approx(1, abs=0.1)


def test_reading_neighbours_is_no_credit_for_tokens_that_repeat_there() -> None:
    """In "aabb…" the previous token is often the same one; a head that always reads it has no lift on duplicates."""
    tokens = torch.arange(T // 2).repeat_interleave(2)[None]
    found = lifts(shifted(T, 1), tokens)
    assert found["duplicate"] == pytest.approx(1, abs=0.1)
    assert found["previous"] > 8


def test_the_heads_that_patterns_are_named_after_have_a_lift() -> None:
    tokens = torch.randint(12, (1, T), generator=torch.Generator().manual_seed(1))
    duplicate, induction = torch.eye(T), torch.eye(T)
    for t in range(T):
        earlier = [s for s in range(t) if tokens[0, s] == tokens[0, t]]
        if earlier:
            duplicate[t], induction[t] = torch.eye(T)[earlier[-1]], torch.eye(T)[earlier[0] + 1]
    assert lifts(duplicate, tokens)["duplicate"] > 3
    assert lifts(induction, tokens)["induction"] > 3
    sink = torch.zeros(T, T)
    sink[:, 0] = 1
    assert lifts(sink)["first"] > 8


def test_distances_of_known_heads() -> None:
    distances = Distances()
    distances.add(seen_rows(torch.stack((uniform(T), shifted(T, 7)))[None]))
    equal, back = distances.shares()
    assert equal.sum().item() == pytest.approx(1)
    assert equal[0].item() == pytest.approx(sum(1 / n for n in range(1, T + 1)) / T, rel=1e-5)
    assert back[7].item() == pytest.approx((T - 7) / T)
    assert median_distance(distances.shares()).tolist()[1] == 7


@pytest.mark.parametrize("null", [0, 2])
def test_a_sliding_window_hides_keys_from_every_measure(null: int) -> None:
    """Equal weights over the latest five keys: what gives each query all earlier keys would find no such row."""
    window = torch.ones(T, T, dtype=torch.bool).tril().triu(-4)
    visible = torch.cat((torch.ones(T, null, dtype=torch.bool), window), 1)
    weights = visible / visible.sum(-1, keepdim=True)
    rows = seen_rows(6.0 * weights, 6.0, null, visible=visible)
    is_bounded = visible.sum(-1) > 6
    assert figures(rows, "gate_equivalent") == pytest.approx(
        [1.0 if bounded else math.nan for bounded in is_bounded], nan_ok=True
    )
    sums = visible / visible.sum(-1, keepdim=True) * visible.sum(-1, keepdim=True).clamp(max=6)
    assert figures(seen_rows(sums, 6.0, null, visible=visible), "row_sum_error") == pytest.approx([0] * T, abs=1e-5)
    found = lifts(weights, torch.zeros(1, T, dtype=torch.long), null, visible)
    assert found == pytest.approx(dict.fromkeys(("self", "previous", "first", "duplicate", "induction"), 1), rel=1e-5)
    only_text = window / window.sum(-1, keepdim=True)
    late = sink_of(only_text, visible=window)["sink_mass"]
    assert late == [pytest.approx(sum(1 / n for n in range(1, 6)) / 5)], "the first key has five queries"


def sink_of(weights: Tensor, null: int = 0, visible: Tensor | None = None) -> dict[str, list[float]]:
    sinks = Sinks()
    sinks.add(seen_rows(weights, null=null, visible=visible))
    return {name: figure.tolist() for name, figure in sinks.means().items()}


def test_a_key_that_most_queries_read_is_a_sink() -> None:
    first, late, null = (torch.zeros(T, T + 1) for _ in range(3))
    null[:, 0], first[:, 1] = 1, 1
    late[:10, 1:] = torch.eye(T)[:10]
    late[10:, 1 + 10] = 1
    for weights in (first, late, null):
        assert sink_of(weights, null=1) == {"sink_mass": [pytest.approx(1)], "sink_rate": [1]}
    assert sink_of(shifted(T, 1))["sink_rate"] == [0]
    assert sink_of(torch.eye(T))["sink_rate"] == [0], "the last key is read by itself alone"
    harmonic = sum(1 / n for n in range(1, T + 1)) / T
    assert sink_of(uniform(T)) == {"sink_mass": [pytest.approx(harmonic)], "sink_rate": [0]}


def test_sinks_are_counted_by_window() -> None:
    """Two windows in one batch, and one in blocks after them."""
    first = torch.zeros(T, T)
    first[:, 0] = 1
    sinks = Sinks()
    sinks.add(seen_rows(torch.stack((first, torch.eye(T))).unsqueeze(1)))
    sinks.add(seen_rows(first[: T // 2]))
    sinks.add(seen_rows(first[T // 2 :], position=T // 2))
    assert sinks.means()["sink_rate"].item() == pytest.approx(2 / 3)
