"""The distribution that a token is drawn from equals its definition, token by token."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from cda_cli.errors import ConfigError
from cda_cli.generation import SamplingSettings, filtered_distribution
from cda_cli.generation.sampling import Filters, draw, filtered_probabilities
from cda_cli.ops import draw_token
from cda_cli.runtime import deterministic
from tests.devices import DEVICES

LOGITS = st.lists(st.integers(-400, 400), min_size=1, max_size=30, unique=True).map(
    lambda values: [value / 40 for value in values]
)
SHARE = st.floats(0.01, 1.0)
SETTINGS = st.builds(
    SamplingSettings,
    temperature=st.floats(0.2, 5),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | SHARE,
    min_p=st.none() | SHARE,
)


def brute_force(logits: list[float], settings: SamplingSettings) -> tuple[list[float], float]:
    """Returns the probabilities, and how near a share came to the border of a filter."""
    weights = [math.exp((value - max(logits)) / settings.temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    nearest = math.inf
    if settings.top_k is not None:
        order = order[: settings.top_k]
    total = math.fsum(weights[token] for token in order)
    if settings.top_p is not None:
        kept, mass = [], 0.0
        for token in order:
            nearest = min(nearest, abs(mass - settings.top_p))
            if mass >= settings.top_p:
                break
            kept.append(token)
            mass += weights[token] / total
        order = kept
    if settings.min_p is not None:
        likeliest = weights[order[0]]
        for token in order[1:]:
            nearest = min(nearest, abs(weights[token] / likeliest - settings.min_p))
        order = [token for token in order if weights[token] >= settings.min_p * likeliest]
    total = math.fsum(weights[token] for token in order)
    return [weights[token] / total if token in order else 0.0 for token in range(len(logits))], nearest


@given(LOGITS, SETTINGS)
def test_filters_are_those_of_their_definitions(logits: list[float], settings: SamplingSettings) -> None:
    """They apply in the order top_k, top_p, min_p, each to what the one before it left."""
    expected, nearest = brute_force(logits, settings)
    assume(nearest > 1e-5)  # at a border float32 may go either way
    found = filtered_distribution(torch.tensor(logits), settings)
    assert [share > 0 for share in found.tolist()] == [share > 0 for share in expected]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@given(
    st.lists(st.integers(-3, 3) | st.floats(-80, 80, width=32), min_size=1, max_size=30),
    SETTINGS,
    st.floats(0.01, 5),
)
@example([0.0, 1e-30], SamplingSettings(top_p=0.5), 1.0)
def test_a_token_always_stays_and_shares_sum_to_1(
    logits: list[float], settings: SamplingSettings, temperature: float
) -> None:
    """The likeliest tokens stay, ties included: a draw from nothing fails far from its cause."""
    found = filtered_distribution(torch.tensor(logits), settings._replace(temperature=temperature))
    assert found.sum().item() == pytest.approx(1, abs=1e-5)
    assert (found >= 0).all()
    assert max(value for value, share in zip(logits, found.tolist(), strict=True) if share > 0) == max(logits)


def test_without_filters_it_is_the_softmax() -> None:
    logits = torch.tensor([2.0, -1.0, 0.5, 30.0, -40.0])
    torch.testing.assert_close(filtered_distribution(logits, SamplingSettings(0.5)), (logits / 0.5).softmax(-1))


@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 5, 6, 7])
def test_top_k_keeps_that_many_and_no_more(top_k: int) -> None:
    """k goes up to all tokens but one, and beyond the number of tokens."""
    found = filtered_distribution(torch.tensor([0.5, 3.0, -1.0, 0.0, 1.0, 2.0]), SamplingSettings(1.0, top_k=top_k))
    assert (found > 0).sum() == min(top_k, 6)


def test_top_k_keeps_tokens_that_are_equally_likely() -> None:
    """Which of them would go is an accident of the sort."""
    found = filtered_distribution(torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0]), SamplingSettings(1.0, top_k=2))
    assert (found > 0).tolist() == [True, True, True, False, True]


@given(st.lists(st.integers(-2, 2), min_size=2, max_size=20), SHARE)
def test_top_p_keeps_no_more_than_it_needs(logits: list[int], top_p: float) -> None:
    """The kept tokens make up the share, and without the least likely of them they do not, with ties and without."""
    whole = torch.tensor(logits).double().softmax(-1)
    kept = filtered_distribution(torch.tensor(logits).float(), SamplingSettings(1.0, top_p=top_p)) > 0
    assert whole[kept].sum() >= top_p - 1e-5
    assert whole[kept].sum() - whole[kept].min() < top_p + 1e-5
    assert whole[kept].min() >= whole[~kept].max() if (~kept).any() else True


@pytest.mark.parametrize("off", [{"top_p": 1.0}, {"top_k": 10**9}])
def test_a_filter_that_asks_for_all_takes_nothing_away(off: dict[str, float]) -> None:
    """An unlikely token stays too: the share of the others rounds to 1 long before it is 1."""
    logits = torch.tensor([0.0, -20.0, -21.0, -22.0])
    found = filtered_distribution(logits, SamplingSettings(1.0, **off))
    assert (found > 0).all(), "a token was filtered out"
    torch.testing.assert_close(found, logits.softmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-44, 1e-300])
def test_a_low_temperature_comes_down_to_the_likeliest(temperature: float) -> None:
    """The logits must not overflow."""
    found = filtered_distribution(torch.tensor([1.0, 4.0, -50.0]), SamplingSettings(temperature))
    assert found.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (SamplingSettings(-0.1), "--temperature must be 0 or more, not -0.1"),
        (SamplingSettings(math.nan), "--temperature must be"),
        (SamplingSettings(top_k=0), "--top-k keeps that many tokens, so it must be 1 or more, not 0"),
        (SamplingSettings(top_k=-3), "--top-k keeps that many tokens, so it must be 1 or more, not -3"),
        (SamplingSettings(top_p=0.0), "--top-p is a share, above 0 and at most 1, not 0.0"),
        (SamplingSettings(top_p=1.01), "--top-p is a share, above 0 and at most 1, not 1.01"),
        (SamplingSettings(top_p=math.nan), "--top-p is a share, above 0 and at most 1, not nan"),
        (SamplingSettings(min_p=-0.5), "--min-p is a share, above 0 and at most 1, not -0.5"),
        (SamplingSettings(min_p=2.0), "--min-p is a share, above 0 and at most 1, not 2.0"),
    ],
    ids=str,
)
def test_a_setting_without_meaning_is_one_sentence(settings: SamplingSettings, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
        settings.check()


def test_settings_at_their_ends_are_allowed() -> None:
    SamplingSettings(0.0, top_k=1, top_p=1.0, min_p=1.0).check()
    SamplingSettings(100.0, top_k=10**9, top_p=1e-9, min_p=1e-9).check()


def test_a_draw_is_exact_and_deterministic() -> None:
    """Each of 5,000 tokens has one share. On a GPU PyTorch refuses sums whose order is left open."""
    shares = torch.full((3, 5000), 1 / 5000, dtype=torch.float64, device=DEVICES[-1])
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-52], dtype=torch.float64, device=DEVICES[-1])
    with deterministic(wanted=True):
        assert draw(shares, uniform).tolist() == [0, 2500, 4999]


@pytest.mark.parametrize(("V", "dtype"), [(23, torch.float32), (5000, torch.bfloat16)], ids=str)
def test_a_kernel_draws_the_token_of_its_definition(V: int, dtype: torch.dtype) -> None:
    """The likeliest and drawn ones, from tokens of equal share and of none, with other random numbers in each row."""
    generator = torch.Generator().manual_seed(V)
    logits = (3 * torch.randn(6, 1, V, generator=generator)).round().to(dtype).expand(6, 2, V)[:, 0]
    logits = logits.masked_fill(torch.rand(6, V, generator=generator) < 0.2, -torch.inf)
    temperature = torch.tensor([1.0, 0.3, 1.7, 0.8, 1e-9, 1.0], dtype=torch.float64)
    greedy, count = torch.tensor([False] * 5 + [True]), torch.tensor([0, 1, 2, 3, 4, 9])
    uniform = torch.rand(6, 4, dtype=torch.float64, generator=generator)
    uniform[0, 0], uniform[3, 3] = 0.0, 1 - 2.0**-52
    shares = filtered_probabilities(logits.float(), Filters(temperature, None, None, None))
    expected = draw(shares, uniform.gather(1, (count % 4)[:, None]).squeeze(1))
    expected[5] = logits[5].argmax()
    tensors = (logits, temperature, greedy, uniform, count)
    assert draw_token(*(tensor.to(DEVICES[-1]) for tensor in tensors)).tolist() == expected.tolist()
