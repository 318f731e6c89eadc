"""The Triton kernels of the row operator themselves: lengths around their blocks, rows in parts, and their stores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cda_cli.ops import soft_topk
from cda_cli.ops.solve_spec import SolveSpec
from cda_cli.ops.solvers.iterative import Annealing
from cda_cli.ops.triton import row_launches as kernels
from tests.ops.cases import (
    DEVICE,
    UNIT,
    Rows,
    assert_within,
    differentiable,
    optimum,
    optimum_gradients,
    random_rows,
    tolerance,
)

PLAN = Annealing.of(SolveSpec("iterative", 0.1, 4, 4.0, 0.3))
BUDGETS = (0.5, 1.0, 2.5, 7.0, 1e6)
LENGTHS = [1, 2, 15, 16, 17, 33, 64, 65, 129, 257]


@pytest.fixture(params=["in registers", "in parts"])
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every row in registers, as its length would have it, or every row in parts of 64 entries."""
    if request.param == "in parts":
        monkeypatch.setattr(kernels, "REGISTER_LIMIT", 0)
        monkeypatch.setattr(kernels, "PART", 64)
    return request.param


def inputs(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """scores [5, n], one of them −inf in row 1, nothing visible in row 2; budgets [5]; g [5, n]."""
    scores = random_rows(5, n, seed=n)
    scores[1, n // 2] = scores[2] = -torch.inf
    return scores, torch.tensor(BUDGETS), random_rows(5, n, seed=n + 1)


def run(solver: str, scores: Tensor, budget: Tensor, grad_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(λ, ∂s, ∂k) from the kernels."""
    scores, budget, grad_weights = scores.to(DEVICE), budget.to(DEVICE), grad_weights.to(DEVICE)
    if solver == "exact":
        weights, saved = kernels.exact_forward(scores, budget, 0.1)
        grads = kernels.exact_backward(grad_weights, scores, saved, 0.1)
    else:
        weights, saved = kernels.iterative_forward(scores, budget, *PLAN)
        grads = kernels.iterative_backward(grad_weights, scores, budget, saved, *PLAN)
    return weights.cpu(), grads[0].cpu(), grads[1].cpu()


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("n", LENGTHS)
def test_exact_at_every_length(n: int) -> None:
    scores, budget, grad_weights = inputs(n)
    rows = Rows(scores, budget, 0.1)
    weights, grad_scores, grad_k = run("exact", scores, budget, grad_weights)
    solution = optimum(rows)
    assert_within(weights, solution.weights, tolerance(rows), "λ")
    expected_scores, expected_k = optimum_gradients(rows, solution, grad_weights)
    floor = 8 * UNIT * grad_weights.abs().amax(-1).double()
    bound = 1e-4 * expected_scores.abs().amax(-1) + floor / 0.1
    assert_within(grad_scores, expected_scores, bound.unsqueeze(-1).expand_as(grad_scores), "∂L/∂s")
    assert_within(grad_k, expected_k, 1e-4 * expected_k.abs() + floor, "∂L/∂k")
    assert (grad_scores[solution.capped] == 0).all()


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("eps", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("scores", ["normal", "long tails", "flat", "tied", "far from zero", "two heaps"])
def test_exact_wherever_the_guess_of_the_threshold_lands(scores: str, eps: float) -> None:
    """Newton starts from the threshold of normal scores: near, too high, too low, and beyond what one shift reaches."""
    normal = random_rows(4, 150)
    rows = Rows(
        {
            "normal": normal,
            "long tails": normal.abs().pow(3) * normal.sign(),
            "flat": torch.linspace(-2, 1, 150).expand(4, 150).contiguous(),
            "tied": (4 * normal).round() / 4,
            "far from zero": normal + 1e3,
            "two heaps": torch.cat((normal[:, :145], normal[:, 145:] + 40), -1),
        }[scores],
        torch.tensor([2.0, 7.5, 40.0, 140.0]),
        eps,
    )
    weights, saved = kernels.exact_forward(rows.scores.to(DEVICE), rows.budget().to(DEVICE), eps)
    solution, tol = optimum(rows), tolerance(rows)
    assert_within(weights.cpu(), solution.weights, tol, "λ")
    assert_within(weights.cpu().double().sum(-1), rows.budget().double(), rows.budget().double() * tol, "Σλ")
    smooth = differentiable(rows, solution, tol)
    assert smooth.any()
    grad_weights = random_rows(4, 150, seed=1)
    grads = kernels.exact_backward(grad_weights.to(DEVICE), rows.scores.to(DEVICE), saved, eps)
    expected_scores, expected_k = optimum_gradients(rows, solution, grad_weights)
    floor = 8 * UNIT * grad_weights.abs().amax(-1).double()
    bound = (1e-4 * expected_scores.abs().amax(-1) + floor / eps).unsqueeze(-1).expand(4, 150)
    assert_within(grads[0].cpu()[smooth], expected_scores[smooth], bound[smooth], "∂L/∂s")
    assert_within(grads[1].cpu()[smooth], expected_k[smooth], (1e-4 * expected_k.abs() + floor)[smooth], "∂L/∂k")


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("n", LENGTHS)
def test_iterative_at_every_length(n: int) -> None:
    """As the PyTorch path in float64, which has its own test against the published code."""
    scores, budget, grad_weights = inputs(n)
    leaves = scores.double().requires_grad_(), budget.double().requires_grad_()
    settings = {"n_iters": len(PLAN.steps), "eps_init": 4.0, "eps_decay": 0.3}
    expected = soft_topk(*leaves, solver="iterative", backend="torch", eps=0.1, **settings)
    expected_grads = torch.autograd.grad(expected, leaves, grad_weights.double())
    weights, *grads = run("iterative", scores, budget, grad_weights)
    scale = 1e-5 * grad_weights.abs().max().item() / 0.1
    assert_within(weights, expected, 1e-5, "λ")
    assert_within(grads[0], expected_grads[0], scale, "∂L/∂s")
    assert_within(grads[1], expected_grads[1], scale, "∂L/∂k")


@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_a_row_longer_than_the_registers_goes_in_parts(solver: str) -> None:
    """One entry more than the limit, with the limits as they are: as the float64 PyTorch path."""
    n = kernels.REGISTER_LIMIT + 1
    scores, grad_weights, budget = random_rows(1, n), random_rows(1, n, seed=1), torch.tensor([50.0])
    leaves = scores.double().requires_grad_(), budget.double().requires_grad_()
    settings = {"n_iters": len(PLAN.steps), "eps_init": 4.0, "eps_decay": 0.3}
    expected = soft_topk(*leaves, solver=solver, backend="torch", eps=0.1, **settings)
    expected_grads = torch.autograd.grad(expected, leaves, grad_weights.double())
    weights, *grads = run(solver, scores, budget, grad_weights)
    scale = 1e-5 * grad_weights.abs().max().item() / 0.1
    assert_within(weights, expected, 1e-5, "λ")
    assert_within(grads[0], expected_grads[0], scale, "∂L/∂s")
    assert_within(grads[1], expected_grads[1], scale, "∂L/∂k")


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("solver", ["exact", "iterative"])
@pytest.mark.parametrize("n", [1, 7, 70, 100])
def test_every_output_is_written_and_nothing_beside_it(solver: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are views into a larger buffer of a poison: it is gone within them, and untouched around them."""
    poison, margin = 12345.0, 600
    buffers: list[tuple[Tensor, int]] = []

    class PoisonedTorch:
        """The module torch as the kernels' module sees it."""

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
            size = math.prod(shape)
            buffer = torch.full((size + 2 * margin,), poison, dtype=dtype, device=device)
            buffers.append((buffer, size))
            return buffer[margin : margin + size].view(shape)

        def empty_like(self, like: Tensor) -> Tensor:
            return self.empty(like.shape, like.dtype, like.device)

    scores, budget, grad_weights = inputs(n)
    expected = run(solver, scores, budget, grad_weights)
    monkeypatch.setattr(kernels, "torch", PoisonedTorch())
    actual = run(solver, scores, budget, grad_weights)
    assert len(buffers) >= 4
    for buffer, size in buffers:
        assert (buffer[:margin] == poison).all()
        assert (buffer[margin + size :] == poison).all()
    # Of the numbers between the passes of the iterative backward, in parts, the last is not needed.
    for buffer, size in buffers[:4]:
        assert not (buffer[margin : margin + size] == poison).any()
    for poisoned_one, plain in zip(actual, expected, strict=True):
        assert torch.equal(poisoned_one, plain)


def test_an_iterated_row_does_not_depend_on_the_number_of_rows() -> None:
    """But in generation, where few rows take more warps. Without a GPU there are none, and fewer rows say the same."""
    scores = random_rows(*((kernels.FEW_ROWS + 1, 1024) if DEVICE == "cuda" else (3, 64))).to(DEVICE)
    budget = torch.full(scores.shape[:1], 2.5, device=DEVICE)
    weights, history = kernels.iterative_forward(scores, budget, *PLAN)
    alone, history_alone = kernels.iterative_forward(scores[:1], budget[:1], *PLAN)
    assert torch.equal(weights[:1], alone)
    assert torch.equal(history[:, :1], history_alone)
    with torch.inference_mode():
        of_few, _ = kernels.iterative_forward(scores[:1], budget[:1], *PLAN)
    settings = {"eps": 0.1, "n_iters": 4, "eps_init": 4.0, "eps_decay": 0.3}
    expected = soft_topk(scores[:1].double(), 2.5, solver="iterative", backend="torch", **settings)
    assert_within(of_few.cpu(), expected.cpu(), tolerance(Rows(scores[:1].cpu(), 2.5, 0.1)), "λ")


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_a_budget_that_is_not_above_0_makes_its_row_nan(solver: str) -> None:
    """With its gradients; and the rows beside it are as they were."""
    scores, budget, grad_weights = random_rows(6, 70), torch.full((6,), 2.5), random_rows(6, 70, seed=1)
    sound = run(solver, scores, budget, grad_weights)
    budget[1:5] = torch.tensor([0.0, -2.0, -math.inf, math.nan])
    for spoilt, before in zip(run(solver, scores, budget, grad_weights), sound, strict=True):
        assert spoilt[1:5].isnan().all()
        assert torch.equal(spoilt[[0, 5]], before[[0, 5]])


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_an_infinite_budget_covers_its_row(solver: str) -> None:
    budget = torch.tensor([math.inf, 1e30, torch.finfo(torch.float32).max])
    weights, *grads = run(solver, random_rows(3, 70), budget, random_rows(3, 70, seed=1))
    assert_within(weights, torch.ones(3, 70), 1e-6, "λ")
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_inputs_need_not_be_contiguous(solver: str) -> None:
    """Every second entry of wider rows, and a budget of one number that all rows share."""
    wide, wide_grad = random_rows(4, 2 * 70), random_rows(4, 2 * 70, seed=1)
    shared = torch.tensor(2.5).expand(4)
    actual = run(solver, wide[:, ::2], shared, wide_grad[:, ::2])
    expected = run(solver, wide[:, ::2].contiguous(), shared.contiguous(), wide_grad[:, ::2].contiguous())
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
