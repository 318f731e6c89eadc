"""soft_topk, iterative solver: the published `coor_descent` under autograd, its ε quirk included."""

from __future__ import annotations

import math

import pytest
import torch
from colt5_attention.coor_descent import coor_descent
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.ops import reference_soft_topk, soft_topk
from tests.ops.cases import BACKENDS, assert_within, gradients, random_mask, random_rows, soft_topk_of

BACKENDS_AND_DTYPES = [("torch", torch.float32), ("torch", torch.float64), ("triton", torch.float32)]
SEED_SETTINGS = {"eps": 0.1, "n_iters": 20, "eps_init": 4.0, "eps_decay": 0.7}


def published(scores: Tensor, budget: Tensor, **settings: object) -> Tensor:
    return coor_descent(scores, k=budget, **settings)


def assert_parity(backend: str, scores: Tensor, budget: Tensor, mask: Tensor | None, **settings: float) -> None:
    """λ, ∂s and ∂k, to the natural scale of a summand of the unrolled gradient: max |g|/ε.

    PyTorch repeats the published operations one by one, and so their rounding. The kernels compute the same numbers in
    an order of their own, and one unit in the last place of a (2.4e-7 where |a| is from 2 to 4) is 1.2e-5 of a weight
    at ε = 0.02: on top of the rule they may be off by what the published float32 result itself is.
    """
    precision = 1e-9 if scores.dtype == torch.float64 else 1e-5
    if mask is not None:
        # Autograd through the published code has no finite gradient in a row that sees nothing.
        seeing = mask.any(-1)
        scores, budget, mask = scores[seeing], budget[seeing], mask[seeing]
    if not len(scores):
        return
    grad_weights = random_rows(*scores.shape, seed=77).to(scores.dtype)
    expected = gradients(published, scores, budget, grad_weights, mask=mask, **settings)
    door = soft_topk_of(backend)
    actual = gradients(door, scores, budget, grad_weights, mask=mask, solver="iterative", **settings)
    scale = precision * max(1.0, grad_weights.abs().max().item()) / settings["eps"]
    rounding = [0.0, 0.0, 0.0]
    if backend == "triton":
        exact = gradients(published, scores.double(), budget.double(), grad_weights.double(), mask=mask, **settings)
        rounding = [(ours - theirs).abs().max().item() for ours, theirs in zip(expected, exact, strict=True)]
    assert_within(actual[0], expected[0], precision + rounding[0], "λ")
    assert_within(actual[1], expected[1], scale + rounding[1], "∂L/∂s")
    assert_within(actual[2], expected[2], scale + rounding[2], "∂L/∂k")


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("eps", [0.02, 0.1, 1.0, 4.0, 6.0])
@pytest.mark.parametrize("k", [0.5, 1.0, 2.0, 12.3, 90.0])
def test_parity_with_the_published_operator(
    backend: str, dtype: torch.dtype, masked: bool, eps: float, k: float
) -> None:
    """At the annealing of the seed, from far fewer than n to more than n, and with ε above its own start."""
    scores = random_rows(8, 77, seed=1).to(dtype)
    mask = random_mask(8, 77, seed=2, share=0.6) if masked else None
    assert_parity(backend, scores, torch.full((8,), k, dtype=dtype), mask, **{**SEED_SETTINGS, "eps": eps})


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("name", ["equal", "tied", "led", "far"])
def test_parity_on_rows_at_the_edge(name: str, backend: str, dtype: torch.dtype) -> None:
    """All equal, ties at the cap, one score leading by 1,000 ε, far from zero."""
    scores = {
        "equal": torch.full((4, 19), 3.7),
        "tied": random_rows(4, 19).round(),
        "led": torch.cat((random_rows(4, 18), torch.full((4, 1), 100.0)), -1),
        "far": random_rows(4, 19) - 50,
    }[name]
    assert_parity(backend, scores.to(dtype), torch.tensor([1.0, 2.0, 2.5, 7.0], dtype=dtype), None, **SEED_SETTINGS)


@pytest.mark.slow
@given(st.data())
def test_parity_whatever_the_annealing(data: st.DataObject) -> None:
    """Any shape, any k per row, n_iters from 1 to 25, eps_decay up to 1.0 and eps_init on either side of ε."""
    shape = (*data.draw(st.lists(st.integers(1, 4), max_size=2)), data.draw(st.integers(1, 60)))
    seed = data.draw(st.integers(0, 2**32))
    backend, dtype = data.draw(st.sampled_from(BACKENDS_AND_DTYPES))
    settings = {
        "eps": data.draw(st.floats(0.05, 4.0)),
        "n_iters": data.draw(st.integers(1, 25)),
        "eps_init": data.draw(st.floats(0.05, 8.0)),
        "eps_decay": data.draw(st.one_of(st.floats(0.1, 1.0), st.just(1.0))),
    }
    share = data.draw(st.sampled_from((None, 0.2, 0.7)))
    mask = None if share is None else random_mask(*shape, seed=seed + 1, share=share)
    budget = 0.2 + shape[-1] * torch.rand(shape[:-1], generator=torch.Generator().manual_seed(seed)).to(dtype)
    if mask is not None and not shape[:-1]:
        mask[0] = True
        scores = random_rows(*shape, seed=seed).to(dtype)
        assert_parity(backend, scores[None], budget[None], mask[None], **settings)
    else:
        assert_parity(backend, random_rows(*shape, seed=seed).to(dtype), budget, mask, **settings)


@pytest.mark.parametrize(("rows", "n", "seed"), [(256, 22, 3), (4, 17_000, 2)], ids=["in registers", "in parts"])
def test_in_the_kernels_rounding_does_not_add_up_over_the_iterations(rows: int, n: int, seed: int) -> None:
    """At one ε they do not iterate on a, which is rounded to 1e-7: 2e-6 of a weight at ε = 0.05, for each iteration.

    The published result is off by 1.3e-5 and 8e-6 in these rows.
    """
    scores = random_rows(rows, n, seed=seed)
    budget = 0.2 + n / 5 * torch.rand(rows, generator=torch.Generator().manual_seed(seed)).square()
    settings = {"eps": 0.05, "n_iters": 25, "eps_init": 0.05}
    weights = soft_topk_of("triton")(scores, budget, solver="iterative", **settings)
    assert_within(weights, published(scores.double(), budget.double(), **settings), 5e-6, "λ")


def test_eps_is_decayed_once_more_after_the_last_update() -> None:
    """One step at ε = 4 gives a = 4 log(k/n); the weights are then taken at ε = 4 · 0.5, not at 4 and not at 0.1."""
    scores = torch.tensor([[3.0, 1.0, -2.0, 0.5, -1.0]], dtype=torch.float64)
    weights = soft_topk(scores, 2.0, solver="iterative", n_iters=1, eps_init=4.0, eps_decay=0.5, eps=0.1)
    expected = ((scores + 4 * math.log(2 / 5)).clamp(max=0) / 2).exp()
    assert_within(weights, expected, 1e-14, "λ")


def test_the_last_eps_does_not_fall_below_eps() -> None:
    """Where the annealing would go below ε it stays there: one step at 0.5, the weights at ε = 0.4."""
    scores = torch.tensor([[0.3, -0.1, 0.2]], dtype=torch.float64)
    weights = soft_topk(scores, 1.0, solver="iterative", n_iters=1, eps_init=0.5, eps_decay=0.1, eps=0.4)
    assert_within(weights, ((scores + 0.5 * math.log(1 / 3)).clamp(max=0) / 0.4).exp(), 1e-14, "λ")


def test_eps_init_below_eps_has_no_effect() -> None:
    scores = random_rows(4, 9)
    expected = soft_topk(scores, 2.0, solver="iterative", eps=0.5, eps_init=0.5)
    assert torch.equal(soft_topk(scores, 2.0, solver="iterative", eps=0.5, eps_init=0.01), expected)


def test_many_iterations_approach_the_optimum() -> None:
    """At a fixed ε the iteration converges to the exact solver's λ, at the rate m/k."""
    scores = random_rows(6, 40).double()
    weights = soft_topk(scores, 3.5, solver="iterative", eps=0.3, eps_init=0.3, n_iters=400)
    assert_within(weights, reference_soft_topk(scores, 3.5, 0.3).weights, 1e-10, "λ")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_inside(dtype: torch.dtype, backend: str) -> None:
    """The published float32 result on the rounded inputs, rounded once."""
    scores, grad_weights = random_rows(8, 50).to(dtype), random_rows(8, 50, seed=1).to(dtype)
    budget = torch.full((8,), 2.5)
    door = soft_topk_of(backend)
    weights, grad_scores, grad_k = gradients(door, scores, budget, grad_weights, solver="iterative", **SEED_SETTINGS)
    expected = gradients(published, scores.float(), budget, grad_weights.float(), **SEED_SETTINGS)
    unit = torch.finfo(dtype).eps / 2
    assert weights.dtype == grad_scores.dtype == dtype
    assert_within(weights, expected[0], 1e-5 + unit * expected[0].double(), "λ")
    scale = 1e-5 * grad_weights.abs().max().item() / 0.1
    assert_within(grad_scores, expected[1], scale + unit * expected[1].abs().double(), "∂L/∂s")
    assert_within(grad_k, expected[2], scale, "∂L/∂k")
