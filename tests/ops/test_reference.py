"""The specification, checked by what it is not made of: the conditions of the problem, closed forms, differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.ops import reference_attention, reference_gradients, reference_soft_topk
from tests.ops.cases import (
    EXACT_CASES,
    Rows,
    any_rows,
    assert_within,
    differentiable,
    optimum,
    random_rows,
    seeded,
)


def closed_form(scores: Tensor, k: float, eps: float) -> tuple[Tensor, int]:
    """(λ [n], m) of one row, differentiable: cap the m largest scores, m = 0, 1, …, till the next is not above 1."""
    ordered, order = (scores / eps).sort(descending=True)
    for m in range(min(math.ceil(k), len(scores))):
        threshold = math.log(k - m) - ordered[m:].logsumexp(-1)
        if ordered[m] + threshold <= 1e-12:
            weights = torch.cat((torch.ones(m, dtype=torch.float64), (ordered[m:] + threshold).exp()))
            return torch.zeros_like(scores).scatter(-1, order, weights), m
    raise AssertionError("the closed form found no capped set")


@pytest.mark.parametrize("name", EXACT_CASES)
def test_rows_sum_to_k_and_weights_lie_between_0_and_1(name: str) -> None:
    """The constraints of the problem; a row with no more than k visible entries has 1 on each of them."""
    rows = EXACT_CASES[name]
    weights = optimum(rows).weights
    assert weights.dtype == torch.float64
    assert (weights >= 0).all()
    assert (weights <= 1).all()
    visible = rows.visible()
    assert (weights[~visible] == 0).all()
    full = visible.sum(-1) <= rows.budget().double()
    assert torch.equal(weights[full], visible[full].double())
    assert_within(weights.sum(-1)[~full], rows.budget().double()[~full], 1e-9, "Σλ")


@given(any_rows())
def test_the_optimality_conditions_hold(rows: Rows) -> None:
    """One multiplier ν: s − ε log λ = ν on free entries and s ≥ ν on those at 1. Then λ is the optimum."""
    solution = optimum(rows)
    scores = rows.scores.double()
    interior = rows.visible().sum(-1) > rows.budget().double()
    for row_scores, weights, visible in zip(
        scores[interior], solution.weights[interior], rows.visible()[interior], strict=True
    ):
        below = visible & (weights < 1 - 1e-9) & (weights > 1e-290)
        multiplier = row_scores - rows.eps * weights.log()
        free = multiplier[below]
        rounding = 1e-9 * (1 + row_scores[visible].abs().max().item())
        if len(free):
            assert_within(free, free[0].expand_as(free), rounding, "the multiplier of the free entries")
            capped = row_scores[visible & (weights >= 1 - 1e-9)]
            assert (capped >= free[0] - rounding).all(), "an entry at 1 scores too low to be there"


@given(st.integers(2, 30), st.floats(0.05, 3), st.integers(0, 10**6))
def test_no_feasible_point_has_a_larger_objective(n: int, eps: float, seed: int) -> None:
    """⟨s, λ⟩ − ε Σ λ log λ falls along every feasible direction."""
    scores = random_rows(n, seed=seed).double()
    k = 0.1 + (n - 0.2) * torch.rand((), generator=seeded(seed)).item()
    best = reference_soft_topk(scores, k, eps).weights
    other = reference_soft_topk(random_rows(n, seed=seed + 1), k, 0.5).weights

    def objective(weights: Tensor) -> float:
        return (scores @ weights + eps * torch.special.entr(weights).sum()).item()

    for step in (1e-3, 0.1, 1.0):
        assert objective(best + step * (other - best)) <= objective(best) + 1e-9 * n


@pytest.mark.parametrize("eps", [0.01, 0.1, 1.0, 4.0])
def test_k_1_is_softmax(eps: float) -> None:
    scores = random_rows(7, 33, seed=1).double()
    assert_within(reference_soft_topk(scores, 1.0, eps).weights, (scores / eps).softmax(-1), 1e-13, "λ")


@pytest.mark.parametrize("k", [1, 3, 10])
def test_a_small_eps_is_hard_top_k(k: int) -> None:
    scores = torch.stack([torch.randperm(20, generator=seeded(seed)) for seed in range(5)]).double()
    hard = torch.zeros_like(scores).scatter(-1, scores.topk(k).indices, 1.0)
    assert_within(reference_soft_topk(scores, k, 0.01).weights, hard, 1e-12, "λ")


@given(st.integers(1, 40), st.floats(0.02, 4), st.floats(0.01, 1), st.integers(0, 10**6))
def test_weights_and_gradients_equal_the_closed_form(n: int, eps: float, share: float, seed: int) -> None:
    """Bisection against the capped set found by trial, and the implicit gradients against autograd through it."""
    rows = Rows(random_rows(n, seed=seed).double(), max(1e-3, share * (n - 1e-6)), eps)
    solution = optimum(rows)
    scores = rows.scores.clone().requires_grad_()
    weights, m = closed_form(scores, rows.sparsity_k, eps)
    assert_within(solution.weights, weights, 1e-10, "λ")
    if differentiable(rows, solution, 1e-9).item():
        assert solution.capped.sum() == m
        grad_weights = random_rows(n, seed=seed + 1).double()
        (expected,) = torch.autograd.grad(weights, scores, grad_weights)
        grad_scores, _ = reference_gradients(solution, rows.sparsity_k, eps, grad_weights)
        assert_within(grad_scores, expected, 1e-9 * grad_weights.abs().max().item() / eps, "∂L/∂s")


@pytest.mark.parametrize(("k", "eps"), [(1.0, 0.3), (2.5, 0.1), (2.0, 1.0), (7.3, 0.5), (0.4, 4.0), (11.9, 0.5)])
def test_gradients_equal_finite_differences_of_the_weights(k: float, eps: float) -> None:
    """∂L/∂s and ∂L/∂k against central differences of the bisection, on rows that are smooth within the step."""
    rows = Rows(random_rows(6, 12, seed=3).double(), k, eps)
    solution = optimum(rows)
    step = 1e-5 * eps
    assert differentiable(rows, solution, 1e-3).all()
    grad_weights = random_rows(6, 12, seed=4).double()
    grad_scores, grad_k = reference_gradients(solution, k, eps, grad_weights)

    def loss(scores: Tensor, k: float) -> Tensor:
        return (reference_soft_topk(scores, k, eps).weights * grad_weights).sum(-1)

    for i in range(12):
        move = torch.zeros(12, dtype=torch.float64)
        move[i] = step
        difference = (loss(rows.scores + move, k) - loss(rows.scores - move, k)) / (2 * step)
        assert_within(grad_scores[:, i], difference, 1e-7 / eps, f"∂L/∂s of entry {i}")
    difference = (loss(rows.scores, k + 1e-5) - loss(rows.scores, k - 1e-5)) / 2e-5
    assert_within(grad_k, difference, 1e-7, "∂L/∂k")


def test_attention_is_the_weights_of_the_visible_keys_times_the_values() -> None:
    """Query t sees keys up to t + S − T: computed one query at a time, from the keys that it sees alone."""
    query, key, value = (random_rows(1, 1, n, 3, seed=n).double() for n in (4, 6, 6))
    output, solution = reference_attention(query, key, value, 1.5, 0.3, 0.7, causal=True)
    for t in range(4):
        seen = t + 6 - 4 + 1
        scores = 0.7 * key[0, 0, :seen] @ query[0, 0, t]
        weights, _ = closed_form(scores, 1.5, 0.3)
        assert_within(solution.weights[0, 0, t, :seen], weights, 1e-12, f"λ of query {t}")
        assert (solution.weights[0, 0, t, seen:] == 0).all()
        assert_within(output[0, 0, t], weights @ value[0, 0, :seen], 1e-12, f"output of query {t}")
