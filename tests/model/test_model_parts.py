"""Temperatures and rotary positions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cda_cli.config import annealed_eps
from cda_cli.model.observe import observing
from cda_cli.model.rotary import RotaryPositions
from tests.model.cases import build, tiny, tokens

EPS = st.floats(1e-3, 10)


@given(start=EPS, end=EPS, share=st.floats(0.01, 1), late=st.floats(0, 0.9), steps=st.integers(2, 10**6))
def test_annealing_runs_from_the_start_to_the_end_and_stays(
    start: float, end: float, share: float, late: float, steps: int
) -> None:
    """It is even in log ε, from where it begins to its share of the schedule."""
    begin = late * share
    model = tiny(eps_anneal_start=start, attn_eps=end, eps_anneal_begin=begin, eps_anneal_share=share)
    length = max(1.0, share * steps - begin * steps)
    for step in (0, int(begin * steps)):
        assert annealed_eps(model, step, steps) == start
    for after in (math.ceil(begin * steps + length), steps + 1, 10 * steps):
        assert annealed_eps(model, after, steps) == pytest.approx(end, rel=1e-12)
    chosen = sorted({math.ceil(begin * steps + length * part / 20) for part in range(20)})
    values = [annealed_eps(model, step, steps) for step in chosen]
    assert values == pytest.approx(sorted(values, reverse=start > end), rel=1e-12), "ε does not go one way"
    for step, value in zip(chosen, values, strict=True):
        passed = min(1.0, (step - begin * steps) / length)
        expected = math.log(start) + passed * (math.log(end) - math.log(start))
        assert math.log(value) == pytest.approx(expected, abs=1e-9)


def test_without_a_start_there_is_no_annealing() -> None:
    assert [annealed_eps(tiny(attn_eps=0.7), step, 10) for step in (0, 5, 10)] == [0.7] * 3


@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_a_set_temperature_is_that_of_a_model_made_with_it(solver: str) -> None:
    """The temperature is that of each layer, with an observer and without."""
    warm, cold = tiny(solver=solver, attn_eps=1.5), tiny(solver=solver, attn_eps=0.2)
    model, other, batch = build(warm), build(cold), tokens(warm)
    with torch.no_grad():
        assert (model(batch) - other(batch)).abs().max() > 1e-2
        model.set_attention_eps(0.2)
        assert torch.equal(model(batch), other(batch))
        with observing(model, lambda seen: None):
            torch.testing.assert_close(model(batch), other(batch), atol=1e-5, rtol=0)
        model.set_attention_eps(1.5)
        assert torch.equal(model(batch), build(warm)(batch)), "ε does not come back"


@given(
    shift=st.integers(0, 200),
    query=st.integers(0, 50),
    key=st.integers(0, 50),
    half=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_rotary_products_depend_on_the_distance_alone(shift: int, query: int, key: int, half: int, seed: int) -> None:
    rotary = RotaryPositions(tiny(dim_head=2 * half, seq_len=256))
    q, k = torch.randn(2, 1, 1, 1, 2 * half, generator=torch.Generator().manual_seed(seed))
    products = [(rotary(q, query + by) * rotary(k, key + by)).sum() for by in (0, shift)]
    scale = max(1.0, float(q.norm() * k.norm()))
    assert abs(products[0] - products[1]) <= 1e-5 * scale


@settings(max_examples=30)
@given(start=st.integers(0, 200), length=st.integers(1, 20), half=st.integers(1, 8), base=st.floats(2, 1e6))
def test_rotary_is_the_rotation_of_its_paper(start: int, length: int, half: int, base: float) -> None:
    """Channels i and i + D/2 are a complex number, which is multiplied by exp(i·position·base^(−2i/D))."""
    rotary = RotaryPositions(tiny(dim_head=2 * half, seq_len=256, rotary_base=base))
    x = torch.randn(2, length, 3, 2 * half, generator=torch.Generator().manual_seed(start))
    position = torch.arange(start, start + length).double()
    angle = position[:, None, None] * base ** (-torch.arange(half).double() / half)
    turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), -1).float()
    torch.testing.assert_close(rotary(x, start), expected, atol=1e-5, rtol=0)


def test_the_position_shows_in_the_logits() -> None:
    """If the position embedding were not added, repeated tokens would all look the same."""
    for position in ("learned", "rotary"):
        model = build(config := tiny(position=position))
        same = torch.tensor([[3, 4] * 5])
        with torch.no_grad():
            logits = model(same)
            swapped = model(torch.tensor([[4, 3] * 4 + [3, 4]]))
        assert config.seq_len >= 10
        assert (logits[0, -1] - swapped[0, -1]).abs().max() > 1e-4, f"{position} positions do not show"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_are_the_same_to_the_bit_with_and_without_a_gradient(dtype: torch.dtype) -> None:
    """Without one, queries and keys are normalised and rotated together."""
    model = build(tiny(position="rotary", qk_norm=True, heads=4, kv_heads=2, dim_head=8))
    for block in model.each_block():
        for norm in (block.attention.query_norm, block.attention.key_norm):
            torch.nn.init.normal_(norm.weight)
    read = torch.arange(10).view(2, 5)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        trained = model(read)
        with torch.no_grad():
            assert torch.equal(model(read), trained)
