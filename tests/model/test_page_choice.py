"""Pages of keys: what is read is exact, and no row leaves out more of its weight than is told."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.model import PAGE, KeySelection
from cda_cli.model.page_choice import PROBED, PageChoice, page_count
from cda_cli.model.rules import AttentionRule, attention_rule
from cda_cli.ops import reference_soft_topk
from tests.model.cases import tiny

RULES: list[dict[str, Any]] = [
    {"attention": "softmax"},
    {"attention": "coordinate-descent", "attn_eps": 0.1},
]
K, R, D = 2, 2, 4  # key heads, queries of each, head width
ROUNDING = 1e-9


def page_limits(key: Tensor) -> Tensor:
    parts = key.split(PAGE, 2)
    return torch.stack([torch.cat((part.amax(2), part.amin(2)), -1) for part in parts], 2)


def problem(
    rule: AttentionRule, lengths: list[int], budget: float, spread: float, seed: int, noise: float = 0.2
) -> tuple[Any, ...]:
    """The arguments of a PageChoice in float64. Keys of a page are alike, so that bounds tell pages apart."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, S = len(lengths), max(lengths)
    pages = normal(B, K, page_count(S), D).repeat_interleave(PAGE, 2)[:, :, :S]
    key = spread * (pages + noise * normal(B, K, S, D))
    of_row = torch.full((B, K, R), budget if rule.has_budget else 1.0, dtype=torch.float64)
    return rule, normal(B, K, R, D), key, torch.tensor(lengths), of_row, page_limits(key)


def weights_of_all(choice: PageChoice) -> Tensor:
    scores = choice.query @ choice.key.mT
    seen = torch.arange(scores.shape[-1]) < choice.keys_B.view(-1, 1, 1, 1)
    return reference_soft_topk(scores, choice.budget, choice.eps, seen.expand_as(scores)).weights


@pytest.mark.parametrize("options", RULES, ids=str)
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=3),
    budget=st.floats(0.5, 90) | st.floats(90, 400),
    spread=st.floats(0.1, 8),
    selection=st.builds(KeySelection, st.integers(128, 400) | st.none(), st.sampled_from([0.5, 0.05, 1e-3])),
    seed=st.integers(0, 99),
    noise=st.sampled_from([0.0, 0.2]),  # Without any, a bound is the score of every key of the page.
)
def test_no_row_leaves_out_more_than_is_told(
    options: dict[str, Any],
    lengths: list[int],
    budget: float,
    spread: float,
    selection: KeySelection,
    seed: int,
    noise: float,
) -> None:
    choice = PageChoice(*problem(attention_rule(tiny(**options)), lengths, budget, spread, seed, noise))
    read, whole = choice.read(selection), weights_of_all(choice)
    if read is None:
        return
    counts = torch.zeros(whole.shape[0], K, whole.shape[-1], dtype=torch.int64)
    counts.scatter_add_(-1, read.slots, read.seen.long())
    assert counts.max() <= 1, "a key is read twice"
    is_read = (counts > 0).unsqueeze(2).expand_as(whole)
    sums = whole.sum(-1)
    left_out = (whole.masked_fill(is_read, 0).sum(-1) / sums).amax(-1)
    assert (left_out <= read.mass_left_out + ROUNDING).all(), "more weight is left out than the bound says"
    assert (read.mass_left_out >= 0).all()
    assert (read.mass_left_out <= 1).all()
    if selection.max_keys is None:
        assert (read.mass_left_out < selection.tolerance).all(), "more may be left out than is tolerated"
    else:
        assert (read.seen.sum(-1) <= selection.max_keys).all(), "more keys are read than are allowed"
    weights = torch.zeros_like(whole)
    weights.scatter_add_(-1, read.slots.unsqueeze(2).expand_as(read.weights), read.weights)
    alone = torch.where(is_read, choice.query @ choice.key.mT, -torch.inf)
    expected = reference_soft_topk(alone, choice.budget, choice.eps).weights
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-7)
    # The output differs by at most 2·δ·max|v|: here for every value of length 1, so in the sum of |μ − λ|.
    difference = (weights - whole).abs().sum(-1) / sums
    assert (difference <= 2 * read.mass_left_out.unsqueeze(-1) + 1e-7).all()


@pytest.mark.parametrize("options", RULES, ids=str)
def test_first_and_newest_pages_and_the_one_that_matters_are_read(options: dict[str, Any]) -> None:
    """Though a query alone chooses for its group, and though the newest page of a shorter row is not the last one."""
    lengths = [20 * PAGE, 11 * PAGE + 1]
    rule, query, key, *others, _ = problem(attention_rule(tiny(**options)), lengths, 1.0, 0.01, 0)
    key[:, :, 5 * PAGE + 3] = 50 * query[:, :, 1]
    for selection in (KeySelection(4 * PAGE), KeySelection(None, 1e-6)):
        read = PageChoice(rule, query, key, *others, page_limits(key)).read(selection)
        assert read is not None, "all pages are read"
        pages = [
            set((slots[seen] // PAGE).tolist()) for slots, seen in zip(read.slots[:, 0], read.seen[:, 0], strict=True)
        ]
        assert {0, 5, 19} <= pages[0]
        assert {0, 5, 11} <= pages[1]
        if selection.max_keys:
            assert read.seen.sum(-1).tolist() == [[4 * PAGE] * K, [3 * PAGE + 1] * K]


def test_a_row_that_one_page_rules_reads_no_more_than_the_probe() -> None:
    lengths = [30 * PAGE]
    rule, query, key, *others, _ = problem(attention_rule(tiny(attention="softmax")), lengths, 1.0, 0.01, 0)
    query = query[:, :, :1].expand(-1, -1, R, -1)
    key[:, :, 7 * PAGE] = 90 * query[:, :, 0]
    read = PageChoice(rule, query, key, *others, page_limits(key)).read(KeySelection(None, 1e-3))
    assert read is not None
    assert read.seen.sum(-1).tolist() == [[PROBED * PAGE] * K]


def test_a_cache_with_room_for_more_keys_does_not_count_as_leaving_some_out() -> None:
    """Otherwise what is all keys would be computed as a selection, with other rounding errors."""
    rule, query, key, _, *others = problem(attention_rule(tiny(attention="softmax")), [6 * PAGE], 1.0, 1.0, 0)
    assert PageChoice(rule, query, key, torch.tensor([3 * PAGE]), *others).read(KeySelection(None, 0.0)) is None
