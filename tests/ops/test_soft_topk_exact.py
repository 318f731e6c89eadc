"""soft_topk, exact solver: the accuracy rules, against the float64 specification."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from cda_cli.ops.reference import Solution
from tests.ops.cases import (
    BACKENDS,
    BACKENDS_AND_DTYPES,
    EXACT_CASES,
    UNIT,
    Rows,
    any_rows,
    assert_within,
    differentiable,
    gradients,
    optimum,
    optimum_gradients,
    random_rows,
    soft_topk_of,
    tolerance,
)

both_backends = pytest.mark.parametrize("backend", BACKENDS)
# Each case in one half precision on each backend, by turns: it is the same problem in both but for rounding. The cases
# with four values of k in a row change places every four, or each value would have the same one.
HALVES = [
    (name, (torch.bfloat16, torch.float16)[(number + number // 4 + turn) % 2], backend)
    for number, name in enumerate(EXACT_CASES)
    for turn, backend in enumerate(BACKENDS)
]


def assert_row_sums(weights: Tensor, rows: Rows, tol: float) -> None:
    """|Σλ − k| ≤ k·tol on rows with more than k visible entries; weight 1 on each entry of the others."""
    visible, budget = rows.visible(), rows.budget().double()
    full = visible.sum(-1) <= budget
    assert torch.equal(weights[full], visible[full].to(weights.dtype)), "a row that k covers has a weight other than 1"
    assert_within(weights.double().sum(-1)[~full], budget[~full], (budget * tol)[~full], "Σλ")


def assert_gradients(backend: str, rows: Rows, solution: Solution, relative: float, rounding: float) -> None:
    """∂s and ∂k of every row to `relative` of its largest entry, plus the `rounding` of g where the gradient cancels.

    The second term is needed: a row that is saturated (λ within rounding of 1 and 0) has a gradient (λ/ε)(g − δ) of
    nothing but the rounding of g − δ.
    """
    grad_weights = random_rows(*rows.scores.shape, seed=99).to(rows.scores.dtype)
    _, grad_scores, grad_k = gradients(
        soft_topk_of(backend), rows.scores, rows.budget(), grad_weights, eps=rows.eps, mask=rows.mask
    )
    assert grad_scores.dtype == rows.scores.dtype
    expected_scores, expected_k = optimum_gradients(rows, solution, grad_weights)
    floor = rounding * grad_weights.abs().amax(-1).double()
    bound = relative * expected_scores.abs().amax(-1) + floor / rows.eps
    assert_within(grad_scores, expected_scores, bound.unsqueeze(-1).expand_as(grad_scores), "∂L/∂s")
    assert_within(grad_k, expected_k, relative * expected_k.abs() + floor, "∂L/∂k")
    still = solution.capped | ~rows.visible()
    assert (grad_scores[still] == 0).all(), "a capped or masked entry has a gradient"
    assert (grad_k[~torch.isfinite(solution.threshold)] == 0).all(), "k has a gradient in a row that it covers"


@both_backends
@pytest.mark.parametrize("name", EXACT_CASES)
def test_float32_weights(name: str, backend: str) -> None:
    """max |λ − λ*| and |Σλ − k| under the rule; masked entries exactly 0."""
    rows = EXACT_CASES[name]
    tol = tolerance(rows)
    weights = soft_topk_of(backend)(rows.scores, rows.sparsity_k, eps=rows.eps, mask=rows.mask)
    assert weights.dtype == torch.float32
    assert weights.shape == rows.scores.shape
    assert_within(weights, optimum(rows).weights, tol, "λ")
    assert (weights[~rows.visible()] == 0).all()
    assert_row_sums(weights, rows, tol)


@both_backends
@pytest.mark.parametrize("name", EXACT_CASES)
def test_float32_gradients(name: str, backend: str) -> None:
    """∂s and ∂k under the rule; every row of the fixed cases has a gradient."""
    rows = EXACT_CASES[name]
    solution = optimum(rows)
    assert differentiable(rows, solution, tolerance(rows)).all()
    assert_gradients(backend, rows, solution, 1e-4, 8 * UNIT)


@pytest.mark.parametrize("name", EXACT_CASES)
def test_float64_stays_float64(name: str) -> None:
    """A step in float32 anywhere leaves an error of 1e-8. The specification rounds its scores too: 4u·max|s|/ε."""
    rows = EXACT_CASES[name].double()
    solution = optimum(rows)
    weights = soft_topk_of("torch")(rows.scores, rows.sparsity_k, eps=rows.eps, mask=rows.mask)
    assert weights.dtype == torch.float64
    scores_rounding = (tolerance(rows) - 1e-5) * 2.0**-29
    tol = scores_rounding + 1e-13
    assert_within(weights, solution.weights, tol, "λ")
    assert_row_sums(weights, rows, tol)
    assert_gradients("torch", rows, solution, 1e-12, scores_rounding + 8 * 2.0**-53)


@pytest.mark.parametrize(("name", "dtype", "backend"), HALVES, ids=str)
def test_half_precision_is_float32_inside(name: str, dtype: torch.dtype, backend: str) -> None:
    """From the rounded inputs on, the only further error is the rounding of the output (and that of float32)."""
    rows = EXACT_CASES[name]._replace(scores=EXACT_CASES[name].scores.to(dtype))
    solution, tol = optimum(rows), tolerance(rows)
    grad_weights = random_rows(*rows.scores.shape, seed=99).to(dtype)
    weights, grad_scores, grad_k = gradients(
        soft_topk_of(backend), rows.scores, rows.budget(), grad_weights, eps=rows.eps, mask=rows.mask
    )
    assert weights.dtype == grad_scores.dtype == dtype
    assert grad_k.dtype == torch.float32

    def rounding(exact: Tensor) -> Tensor:
        info = torch.finfo(dtype)
        return exact.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2

    assert_within(weights, solution.weights, rounding(solution.weights) + tol, "λ")
    expected_scores, expected_k = optimum_gradients(rows, solution, grad_weights)
    smooth = differentiable(rows, solution, tol)
    floor = 8 * UNIT * grad_weights.abs().amax(-1).double()
    bound = (1e-4 * expected_scores.abs().amax(-1) + floor / rows.eps).unsqueeze(-1) + rounding(expected_scores)
    assert_within(grad_scores[smooth], expected_scores[smooth], bound[smooth], "∂L/∂s")
    assert_within(grad_k[smooth], expected_k[smooth], (1e-4 * expected_k.abs() + floor)[smooth], "∂L/∂k")


@both_backends
@given(rows=any_rows())
def test_float32_weights_of_any_rows(rows: Rows, backend: str) -> None:
    tol = tolerance(rows)
    weights = soft_topk_of(backend)(rows.scores, rows.sparsity_k, eps=rows.eps, mask=rows.mask)
    assert_within(weights, optimum(rows).weights, tol, "λ")
    assert (weights[~rows.visible()] == 0).all()
    assert_row_sums(weights, rows, tol)


@both_backends
@given(rows=any_rows())
def test_float32_gradients_of_any_rows(rows: Rows, backend: str) -> None:
    """On the rows that have a gradient; at a kink each side has its own."""
    smooth = differentiable(rows, optimum(rows), tolerance(rows))
    mask = None if rows.mask is None else rows.mask[smooth]
    rows = Rows(rows.scores[smooth], rows.sparsity_k, rows.eps, mask)
    assert_gradients(backend, rows, optimum(rows), 1e-4, 8 * UNIT)


@pytest.mark.parametrize("leaders", [2, 31, 100, 600, 1500])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("torch", torch.float32), ("torch", torch.float64), ("triton", torch.float32)]
)
def test_k_leaders_equal_to_rounding_are_not_all_capped(leaders: int, dtype: torch.dtype, backend: str) -> None:
    """k scores that lead together, some by a few roundings: all k weights may round to above 1, and m stays below k.

    Capping all k leaves log 0 for the dual. Which side of the cap an entry lies on is a matter of rounding here, but
    whatever the side, δ is a mean of g, which bounds the gradients.
    """
    gaps = torch.tensor([0, 1, 4, 8, 16, 32, 64, 128, 256, 512], dtype=dtype) * torch.finfo(dtype).eps
    scores = torch.full((len(gaps), leaders + 3), -100.0, dtype=dtype)
    scores[:, :leaders] = -gaps.unsqueeze(-1)
    scores[:, 0] = 0
    rows = Rows(scores, float(leaders), 1.0)
    grad_weights = random_rows(*scores.shape, seed=1).to(dtype)
    weights, grad_scores, grad_k = gradients(soft_topk_of(backend), scores, rows.budget(), grad_weights, eps=1.0)
    assert_within(weights, optimum(rows).weights, tolerance(rows), "λ")
    assert_row_sums(weights, rows, tolerance(rows))
    largest = grad_weights.abs().max()
    assert (grad_scores.abs() <= 2.001 * largest).all()
    assert (grad_k.abs() <= 1.001 * largest).all()


@both_backends
@pytest.mark.parametrize("eps", [0.01, 0.1, 4.0])
def test_k_1_is_softmax(eps: float, backend: str) -> None:
    scores = random_rows(7, 33)
    assert_within(soft_topk_of(backend)(scores, 1.0, eps=eps), (scores.double() / eps).softmax(-1), 1e-5, "λ")


@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_gradcheck_in_float64(solver: str) -> None:
    """∂s and ∂k against finite differences of the door itself, with a mask."""
    rows = Rows(random_rows(4, 9, seed=1).double(), 2.5, 0.5, random_rows(4, 9, seed=2) > -1)
    assert differentiable(rows, optimum(rows), 1e-3).all()
    scores = rows.scores.requires_grad_()
    budget = torch.tensor([0.7, 1.0, 2.5, 3.2], dtype=torch.float64, requires_grad=True)

    def door(scores: Tensor, budget: Tensor) -> Tensor:
        return soft_topk_of("torch")(scores, budget, eps=0.5, mask=rows.mask, solver=solver, n_iters=6)

    torch.autograd.gradcheck(door, (scores, budget))


@both_backends
@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_a_masked_entry_is_as_one_that_is_not_there(solver: str, backend: str) -> None:
    """Weight and gradient 0 under the mask, whatever stands there; elsewhere as without these entries."""
    scores, grad_weights = random_rows(5, 12), random_rows(5, 12, seed=1)
    mask = torch.tensor([True, False, True, True, False, True, True, True, True, False, True, True])
    present = gradients(soft_topk_of(backend), scores[:, mask], 2.5, grad_weights[:, mask], solver=solver)
    for filler in (0.0, 1e4, -torch.inf, torch.nan):
        filled = scores.masked_fill(~mask, filler)
        weights, grad_scores, grad_k = gradients(
            soft_topk_of(backend), filled, 2.5, grad_weights, mask=mask, solver=solver
        )
        assert (weights[:, ~mask] == 0).all()
        assert (grad_scores[:, ~mask] == 0).all()
        assert_within(weights[:, mask], present[0], 1e-6, "λ")
        assert_within(grad_scores[:, mask], present[1], 1e-5, "∂L/∂s")
        assert_within(grad_k, present[2], 1e-5, "∂L/∂k")


@both_backends
@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_minus_infinity_is_a_mask(solver: str, backend: str) -> None:
    """A score of −inf gives what the mask gives, forward and backward, bit for bit."""
    scores, grad_weights = random_rows(6, 11), random_rows(6, 11, seed=1)
    mask = random_rows(6, 11, seed=2) > 0
    mask[4] = False
    masked = gradients(soft_topk_of(backend), scores, 2.5, grad_weights, mask=mask, solver=solver)
    infinite = gradients(soft_topk_of(backend), scores.masked_fill(~mask, -torch.inf), 2.5, grad_weights, solver=solver)
    for ours, theirs in zip(masked, infinite, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("eps", [0.1, 4.0])
@pytest.mark.parametrize("solver", ["exact", "iterative"])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_a_row_that_sees_nothing_is_zero_with_zero_gradients(
    solver: str, backend: str, dtype: torch.dtype, eps: float
) -> None:
    """Also where ε is above 1, so that ε times the lowest number overflows."""
    scores, mask = random_rows(3, 8).to(dtype), torch.ones(3, 8, dtype=torch.bool)
    mask[1] = False
    weights, grad_scores, grad_k = gradients(
        soft_topk_of(backend),
        scores,
        torch.full((3,), 2.5),
        random_rows(3, 8, seed=1),
        mask=mask,
        solver=solver,
        eps=eps,
    )
    assert (weights[1] == 0).all()
    assert (grad_scores[1] == 0).all()
    assert grad_k[1] == 0
    assert all(tensor.isfinite().all() for tensor in (weights, grad_scores, grad_k))


@both_backends
@pytest.mark.parametrize("k", [1.0, 2.5, 4.0, 4.5, 5.0, 6.0])
@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_nan_stays_in_its_row_and_is_seen_there(solver: str, k: float, backend: str) -> None:
    """The other rows are as they were; the row itself shows it, also where k covers the rest of it, or all."""
    scores, grad_weights = random_rows(4, 5), random_rows(4, 5, seed=1)
    budget = torch.full((4,), k)
    sound = gradients(soft_topk_of(backend), scores, budget, grad_weights, solver=solver)
    scores[2, 3] = torch.nan
    spoilt = gradients(soft_topk_of(backend), scores, budget, grad_weights, solver=solver)
    others = torch.tensor([0, 1, 3])
    for before, after in zip(sound, spoilt, strict=True):
        assert torch.equal(before[others], after[others])
    assert spoilt[0][2].isnan().any(), "a NaN score came out as a weight"


BUDGET_SHAPES: list[tuple[int, ...]] = [(), (1,), (4,), (3, 1), (3, 4), (1, 1, 4), (2, 1, 1), (2, 3, 1), (2, 3, 4)]


@pytest.mark.parametrize("solver", ["exact", "iterative"])
@pytest.mark.parametrize("shape", BUDGET_SHAPES)
def test_k_broadcasts_and_its_gradient_has_its_shape(shape: tuple[int, ...], solver: str) -> None:
    """The gradient of a shared k is the sum of those of the rows that share it."""
    scores, grad_weights = random_rows(2, 3, 4, 10).double(), random_rows(2, 3, 4, 10, seed=1).double()
    k = random_rows(*shape, seed=2).double().abs() * 3 + 0.5
    weights, grad_scores, grad_k = gradients(soft_topk_of("torch"), scores, k, grad_weights, solver=solver)
    spread = gradients(soft_topk_of("torch"), scores, k.expand(2, 3, 4).clone(), grad_weights, solver=solver)
    assert grad_k.shape == shape
    assert_within(weights, spread[0], 1e-14, "λ")
    assert_within(grad_scores, spread[1], 1e-12, "∂L/∂s")
    assert_within(grad_k, spread[2].sum_to_size(shape), 1e-12, "∂L/∂k")


@both_backends
@pytest.mark.parametrize("k", [2, 2.0, torch.tensor(2.0), torch.tensor(2), torch.tensor(2.0, dtype=torch.float64)])
def test_every_form_of_a_shared_k_is_the_same_k(k: float | Tensor, backend: str) -> None:
    scores, soft_topk = random_rows(3, 10), soft_topk_of(backend)
    assert torch.equal(soft_topk(scores, k), soft_topk(scores, torch.full((3,), 2.0)))


@both_backends
@pytest.mark.parametrize("mask_shape", [(7,), (1, 7), (3, 7), (2, 1, 7), (2, 3, 1), (2, 3, 7)])
def test_the_mask_broadcasts(mask_shape: tuple[int, ...], backend: str) -> None:
    soft_topk = soft_topk_of(backend)
    scores, mask = random_rows(2, 3, 7), random_rows(*mask_shape, seed=1) > -0.3
    assert torch.equal(soft_topk(scores, 1.5, mask=mask), soft_topk(scores, 1.5, mask=mask.expand(2, 3, 7).clone()))


@both_backends
@pytest.mark.parametrize("solver", [{"solver": "exact"}, {"solver": "iterative", "n_iters": 3}], ids=str)
@pytest.mark.parametrize("order", [*itertools.permutations(range(3))], ids=str)
def test_strides_do_not_matter(order: tuple[int, ...], solver: dict[str, Any], backend: str) -> None:
    """Weights and gradients of a view equal those of its copy, and neither the scores nor g are written to."""
    scores, grad_weights = random_rows(3, 5, 8).permute(order), random_rows(3, 5, 8, seed=1).permute(order)
    copies = scores.clone(), grad_weights.clone()
    viewed = gradients(soft_topk_of(backend), scores, 1.5, grad_weights, **solver)
    copied = gradients(soft_topk_of(backend), scores.contiguous(), 1.5, grad_weights.contiguous(), **solver)
    for ours, theirs in zip(viewed, copied, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(scores, copies[0])
    assert torch.equal(grad_weights, copies[1])


@both_backends
@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_no_rows_give_no_weights(solver: str, backend: str) -> None:
    weights, grad_scores, _ = gradients(
        soft_topk_of(backend), torch.zeros(0, 3, 5), 2.0, torch.zeros(0, 3, 5), solver=solver
    )
    assert weights.shape == grad_scores.shape == (0, 3, 5)
    assert soft_topk_of(backend)(torch.zeros(2, 0), 2.0, solver=solver).shape == (2, 0)


@both_backends
def test_only_scores_and_a_few_numbers_per_row_are_kept_for_the_backward(backend: str) -> None:
    """Saved weights or copies of the iterates would show here."""
    scores, budget = random_rows(10, 400).requires_grad_(), torch.full((10,), 3.0, requires_grad=True)
    for solver in ("exact", "iterative"):
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            soft_topk_of(backend)(scores, budget, solver=solver, n_iters=20)
        assert sum(kept.values()) <= 10 * (400 + 1 + 20)
        assert sum(kept.values()) >= 10 * 400, "the hooks saw nothing, so the bound above says nothing"
