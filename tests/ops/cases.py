"""Inputs and comparisons that the tests of the operator share."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.ops import reference_gradients, reference_soft_topk, soft_topk
from cda_cli.ops.reference import Solution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = 2.0**-24  # rounding of float32


class Rows(NamedTuple):
    """A problem: scores [..., n], the budget k, ε and a mask (True = visible)."""

    scores: Tensor
    sparsity_k: float | Tensor
    eps: float
    mask: Tensor | None = None

    def double(self) -> Rows:
        k = self.sparsity_k.double() if isinstance(self.sparsity_k, Tensor) else self.sparsity_k
        return self._replace(scores=self.scores.double(), sparsity_k=k)

    def visible(self) -> Tensor:
        visible = self.scores > -torch.inf
        return visible if self.mask is None else visible & self.mask

    def budget(self) -> Tensor:
        """k of each row, as exactly as the arithmetic of these scores has it."""
        dtype = torch.float64 if self.scores.dtype == torch.float64 else torch.float32
        return torch.as_tensor(self.sparsity_k, dtype=dtype).expand(self.scores.shape[:-1])


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_rows(*shape: int, seed: int = 0, spread: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)) * spread


def random_mask(*shape: int, seed: int, share: float) -> Tensor:
    return torch.rand(shape, generator=seeded(seed)) < share


def tolerance(rows: Rows) -> float:
    """The accuracy rule of the exact solver in float32: 1e-5 + 4u·max|s|/ε; scores that are masked do not count."""
    visible = rows.scores[rows.visible()]
    largest = visible.abs().max().item() if visible.numel() else 0.0
    return 1e-5 + 4 * UNIT * largest / rows.eps


def optimum(rows: Rows) -> Solution:
    return reference_soft_topk(rows.scores, rows.budget(), rows.eps, rows.mask)


def optimum_gradients(rows: Rows, solution: Solution, grad_weights: Tensor) -> tuple[Tensor, Tensor]:
    """float64 (∂L/∂s [..., n], ∂L/∂k [...], one of each row)."""
    return reference_gradients(solution, rows.budget(), rows.eps, grad_weights)


def differentiable(rows: Rows, solution: Solution, margin: float) -> Tensor:
    """Rows [...] where λ has a gradient: no entry changes sides of the cap when an exponent moves by `margin`.

    A capped entry may leave the cap; a free one may join it only if it and all that score as high are fewer than k
    (so the k-th entry of a saturated row, which is 1 to rounding and stays free, is no kink).
    """
    scores, visible = rows.scores.double(), rows.visible()
    exponent = (scores + solution.threshold.unsqueeze(-1)) / rows.eps
    ordered = scores.masked_fill(~visible, -torch.inf).sort(-1).values
    as_high = scores.shape[-1] - torch.searchsorted(ordered, scores.contiguous())
    movable = solution.capped | (as_high < rows.budget().unsqueeze(-1))
    return ~(visible & (exponent.abs() <= margin) & movable).any(-1)


def gradients(
    door: Callable[..., Tensor], scores: Tensor, sparsity_k: float | Tensor, grad_weights: Tensor, **settings: object
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, ∂L/∂s, ∂L/∂k) of `door` for L = Σ g·λ, with k of the shape that is given (a number becomes 0-d)."""
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    scores = scores.detach().requires_grad_()
    budget = torch.as_tensor(sparsity_k, dtype=dtype).detach().clone().requires_grad_()
    weights = door(scores, budget, **settings)
    grad_scores, grad_k = torch.autograd.grad(weights, (scores, budget), grad_weights.to(weights.dtype))
    return weights.detach(), grad_scores, grad_k


def assert_within(actual: Tensor, expected: Tensor, bound: float | Tensor, what: str) -> None:
    """|actual − expected| ≤ bound, everywhere; NaN on either side is an error."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    error = (actual.double() - expected.double()).abs()
    bound = torch.as_tensor(bound, dtype=torch.float64, device="cpu").expand(error.shape)
    broken = torch.nonzero(~(error <= bound))
    if len(broken):
        place = tuple(broken[0].tolist())
        raise AssertionError(
            f"{what}: off by {error[place].item():.3e} where {bound[place].item():.3e} is allowed, at {place}: "
            f"{actual[place].item()!r} instead of {expected[place].item()!r}"
        )


def _led(lead: float, seed: int) -> Tensor:
    scores = random_rows(6, 37, seed=seed)
    scores[:, 5] = scores.amax(-1) + lead
    return scores


def exact_cases() -> dict[str, Rows]:
    """The inputs that the accuracy rules name, and their neighbours."""
    cases: dict[str, Rows] = {}
    for eps in (0.01, 0.1, 1.0, 4.0):
        for k in (0.3, 1.0, 2.0, 2.5, 8.0, 31.0):
            cases[f"random eps={eps} k={k}"] = Rows(random_rows(9, 67, seed=int(10 * k)), k, eps)
        several = torch.rand(5, 3, generator=seeded(15)) * 9 + 0.1
        cases[f"k per row eps={eps}"] = Rows(random_rows(5, 3, 41, seed=1), several, eps)
        for k in (1.0, 2.0, 3.5):
            cases[f"one score leads by 1000 eps={eps} k={k}"] = Rows(_led(1000 * eps, seed=int(2 * k)), k, eps)
        half = random_mask(12, 29, seed=6, share=0.5)
        cases[f"mask eps={eps}"] = Rows(random_rows(12, 29, seed=5), 3.0, eps, half)
    for n in (1, 2, 3, 5, 17, 128, 129, 1000):
        for k in (0.5, 0.7 * n, float(n), n + 0.5):
            cases[f"length {n} k={k:g}"] = Rows(random_rows(4, n, seed=n), k, 0.2)
    for value in (0.0, 3.7, -250.0):
        for k in (1.0, 2.5, 7.0):
            cases[f"all equal to {value} k={k}"] = Rows(torch.full((3, 19), value), k, 0.1)
    tied = torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0, -1.0, -1.0])
    for k in (1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 10.5):
        for eps in (0.01, 0.3, 2.0):
            cases[f"ties k={k} eps={eps}"] = Rows(torch.stack((tied, tied.flip(0), tied.roll(3))), k, eps)
    cases["far from zero"] = Rows(random_rows(6, 50, seed=7) + 1e4, 4.0, 0.1)
    cases["wide"] = Rows(random_rows(6, 50, seed=8, spread=1e3), 4.0, 0.1)
    few = random_mask(12, 29, seed=9, share=0.2)
    few[3] = few[7] = False
    cases["some rows see nothing or fewer than k"] = Rows(random_rows(12, 29, seed=10), 6.0, 0.1, few)
    cases["nothing is visible"] = Rows(random_rows(3, 8, seed=11), 2.0, 0.1, torch.zeros(3, 8, dtype=torch.bool))
    holes = random_rows(8, 23, seed=12).masked_fill(random_mask(8, 23, seed=13, share=0.4), -torch.inf)
    cases["-inf scores"] = Rows(holes, 3.0, 0.1)
    cases["-inf scores and a mask"] = Rows(holes, 3.0, 0.1, random_mask(8, 23, seed=14, share=0.6))
    return cases


EXACT_CASES = exact_cases()


@st.composite
def any_rows(draw: st.DrawFn) -> Rows:
    """Any shape, k from far below 1 to beyond n, ε from 0.01 to 4, with ties, leaders and masks."""
    shape = (*draw(st.lists(st.integers(1, 4), max_size=3)), draw(st.integers(1, 70)))
    seed = draw(st.integers(0, 2**32))
    eps = draw(st.floats(0.01, 4.0))
    spread = draw(st.sampled_from((0.1, 1.0, 10.0, 100.0)))
    style = draw(st.sampled_from(("random", "tied", "equal", "led")))
    scores = random_rows(*shape, seed=seed, spread=spread)
    if style == "tied":
        scores = scores.round()
    elif style == "equal":
        scores = scores[..., :1].expand(shape).contiguous()
    elif style == "led":
        scores[..., draw(st.integers(0, shape[-1] - 1))] += draw(st.floats(1, 1000)) * eps
    n = shape[-1]
    k = draw(st.one_of(st.floats(2.0**-10, n + 1, width=32), st.integers(1, n + 1).map(float)))
    share = draw(st.sampled_from((None, 0.1, 0.5, 0.9)))
    mask = None if share is None else random_mask(*shape, seed=seed + 1, share=share)
    return Rows(scores, k, eps, mask)


BACKENDS = ("torch", "triton")
# float64 is for PyTorch alone: the kernels compute in float32.
BACKENDS_AND_DTYPES = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if backend == "torch" or dtype != torch.float64
]


def soft_topk_of(backend: str) -> Callable[..., Tensor]:
    """`soft_topk` with this backend, on the device that it is for; inputs and weights stay where the test has them."""

    def door(scores: Tensor, sparsity_k: float | Tensor, *, mask: Tensor | None = None, **settings: object) -> Tensor:
        device = DEVICE if backend == "triton" else scores.device
        k = sparsity_k.to(device) if isinstance(sparsity_k, Tensor) else sparsity_k
        mask = None if mask is None else mask.to(device)
        return soft_topk(scores.to(device), k, mask=mask, backend=backend, **settings).to(scores.device)

    return door
