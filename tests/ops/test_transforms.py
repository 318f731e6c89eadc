"""What PyTorch does to the doors besides one backward: forward mode, torch.func, gradients of gradients, autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vmap

from cda_cli.ops import soft_topk, soft_topk_attention
from tests.ops.cases import BACKENDS_AND_DTYPES, DEVICE, assert_within, random_rows

ANNEALING = {"n_iters": 5, "eps_init": 2.0, "eps_decay": 0.6}
Door = Callable[..., Tensor]
DOCUMENTS = torch.tensor([[0, 0, 1, 1, 0], [3, 3, 3, 3, 3]])


def rows(solver: str, backend: str = "auto") -> tuple[Door, list[Tensor]]:
    """Scores [3, 7], some masked, and a k for each row."""
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 2:4] = False

    def door(scores: Tensor, budget: Tensor) -> Tensor:
        seen = mask.to(scores.device)
        return soft_topk(scores, budget, eps=0.5, mask=seen, solver=solver, backend=backend, **ANNEALING)

    return door, [random_rows(3, 7, seed=3), torch.tensor([0.7, 2.5, 3.2])]


def attention(solver: str, backend: str = "auto", documents: Tensor | None = None) -> tuple[Door, list[Tensor]]:
    """Two query heads on one key head, with a key in front, and a k for each query."""

    def door(query: Tensor, key: Tensor, value: Tensor, budget: Tensor) -> Tensor:
        packed = None if documents is None else documents.to(query.device)
        settings = {"eps": 0.5, "solver": solver, "backend": backend, "documents": packed, **ANNEALING}
        return soft_topk_attention(query, key, value, budget, **settings)

    tensors = [random_rows(2, heads, length, 3, seed=heads + length) for heads, length in ((2, 4), (1, 5), (1, 5))]
    return door, [*tensors, 0.5 + 2 * random_rows(2, 2, 4, seed=9).abs()]


CALLS = {
    "rows": rows,
    "attention": attention,
    "attention with documents": lambda solver, backend="auto": attention(solver, backend, DOCUMENTS),
}
each_call = pytest.mark.parametrize("name", CALLS)
solvers = pytest.mark.parametrize("solver", ["exact", "iterative"])


def in_float64(name: str, solver: str) -> tuple[Door, list[Tensor]]:
    door, inputs = CALLS[name](solver)
    return door, [tensor.double() for tensor in inputs]


@solvers
@each_call
def test_forward_mode_and_batched_gradients_are_right(name: str, solver: str) -> None:
    """Against finite differences: zeros in forward mode, without a word, would show here."""
    door, inputs = in_float64(name, solver)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    torch.autograd.gradcheck(door, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)


@solvers
@each_call
def test_gradients_of_gradients_are_right(name: str, solver: str) -> None:
    door, inputs = in_float64(name, solver)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    torch.autograd.gradgradcheck(door, leaves, fast_mode=True)


@solvers
def test_one_tensor_given_three_times_has_its_gradient_of_gradients(solver: str) -> None:
    """Each of its three gradients is that of one place alone."""

    def door(x: Tensor) -> Tensor:
        return soft_topk_attention(x, x, x, 1.7, eps=0.5, solver=solver, **ANNEALING)

    x = random_rows(1, 1, 5, 3, seed=4).double().requires_grad_()
    torch.autograd.gradgradcheck(door, (x,))
    once = torch.autograd.grad(door(x).square().sum(), x)[0]
    again = torch.autograd.grad(door(x).square().sum(), x, create_graph=True)[0]
    assert_within(again, once, 1e-12, "gradient with a graph")


@solvers
@each_call
def test_jacobians_of_both_modes_agree(name: str, solver: str) -> None:
    door, inputs = in_float64(name, solver)
    places = tuple(range(len(inputs)))
    forward, reverse = jacfwd(door, places)(*inputs), jacrev(door, places)(*inputs)
    plain = torch.autograd.functional.jacobian(door, tuple(inputs))
    for mine, other, exact in zip(forward, reverse, plain, strict=True):
        assert exact.abs().max() > 0.01, "a Jacobian of zeros would say nothing"
        assert_within(mine, exact, 1e-10, "jacfwd")
        assert_within(other, exact, 1e-10, "jacrev")


@solvers
def test_dual_tensors_carry_their_tangents(solver: str) -> None:
    """Forward mode without torch.func, with a tangent on the budget alone too."""
    door, (scores, budget) = in_float64("rows", solver)
    _, expected = jvp(lambda k: door(scores, k), (budget,), (torch.ones_like(budget),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(budget, torch.ones_like(budget))
        tangent = forward_ad.unpack_dual(door(scores, dual)).tangent
    assert_within(tangent, expected, 1e-12, "tangent")
    if solver == "exact":
        assert_within(expected.sum(-1), torch.ones(3), 1e-12, "∂Σλ/∂k")


@solvers
@each_call
def test_vmap_is_a_loop(name: str, solver: str) -> None:
    """Over all inputs, and over one at a time."""
    door, inputs = in_float64(name, solver)
    batches = [torch.stack((tensor, tensor.flip(0), 1.5 * tensor)) for tensor in inputs]
    for mapped in (set(range(len(inputs))), *({place} for place in range(len(inputs)))):
        dims = tuple(0 if place in mapped else None for place in range(len(inputs)))
        actual = vmap(door, dims)(*(batches[i] if i in mapped else inputs[i] for i in range(len(inputs))))
        for sample, output in enumerate(actual):
            given = [batches[i][sample] if i in mapped else inputs[i] for i in range(len(inputs))]
            assert_within(output, door(*given), 1e-12, f"sample {sample}, mapped over {mapped}")


def test_vmap_over_masks_and_documents_alone_is_a_loop() -> None:
    scores, masks = random_rows(3, 7), random_rows(4, 3, 7, seed=1) > -0.5
    actual = vmap(lambda mask: soft_topk(scores, 1.5, mask=mask))(masks)
    expected = torch.stack([soft_topk(scores, 1.5, mask=mask) for mask in masks])
    assert_within(actual, expected, 1e-6, "λ")
    _, (query, key, value, budget) = attention("exact")
    several = torch.stack((DOCUMENTS, DOCUMENTS.flip(0)))
    actual = vmap(lambda some: soft_topk_attention(query, key, value, budget, documents=some))(several)
    for output, some in zip(actual, several, strict=True):
        assert_within(output, soft_topk_attention(query, key, value, budget, documents=some), 1e-5, "output")


@solvers
@each_call
def test_gradients_of_each_sample(name: str, solver: str) -> None:
    """vmap(grad), also compiled, is a loop of backwards."""
    door, inputs = in_float64(name, solver)
    batch = torch.stack((inputs[0], inputs[0].flip(0)))

    def loss(first: Tensor) -> Tensor:
        return door(first, *inputs[1:]).square().sum()

    expected = torch.stack([torch.autograd.functional.jacobian(loss, sample) for sample in batch])
    assert_within(vmap(grad(loss))(batch), expected, 1e-10, "gradient")
    compiled = torch.compile(lambda x: vmap(grad(loss))(x), fullgraph=True, backend="aot_eager")
    assert_within(compiled(batch), expected, 1e-10, "compiled")


@each_call
def test_the_kernels_are_transformed_as_pytorch_is(name: str) -> None:
    """Forward mode, and gradients with a graph: the backward of the kernels has no gradient of its own."""
    door, inputs = CALLS[name]("exact", "torch")
    kernels, _ = CALLS[name]("exact", "triton")
    inputs = [tensor.to(DEVICE) for tensor in inputs]
    tangents = tuple(random_rows(*tensor.shape, seed=2).to(DEVICE) for tensor in inputs)
    assert_within(jvp(kernels, tuple(inputs), tangents)[1], jvp(door, tuple(inputs), tangents)[1], 1e-4, "tangent")

    def twice(called: Door) -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        first = torch.autograd.grad(called(*leaves).square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(tensor.square().sum() for tensor in first), leaves)
        return [*first, *second]

    for mine, exact in zip(twice(kernels), twice(door), strict=True):
        assert_within(mine, exact, 1e-4 * exact.abs().max().item(), "gradient")


@solvers
def test_the_threshold_in_a_transform_is_that_outside(solver: str) -> None:
    _, (query, key, value, budget) = attention(solver)

    def threshold(query: Tensor) -> tuple[Tensor, Tensor]:
        settings = {"eps": 0.5, "solver": solver, "return_threshold": True, **ANNEALING}
        return soft_topk_attention(query, key, value, budget, **settings)

    (output, inside), (tangent, of_threshold) = jvp(threshold, (query,), (torch.ones_like(query),))
    expected, outside = threshold(query)
    assert_within(output, expected, 1e-5, "output")
    assert torch.equal(inside.isinf(), outside.isinf())
    assert_within(inside.nan_to_num(posinf=0), outside.nan_to_num(posinf=0), 1e-5, "threshold")
    assert tangent.abs().max() > 0.01
    assert (of_threshold == 0).all(), "the threshold is without gradient"


def test_rows_without_a_free_entry_have_derivatives_of_zero() -> None:
    """Of every kind: 0 · inf, where k covers a row, where nothing is seen, and where k is inf."""
    scores = random_rows(3, 4).double()
    scores[1] = -torch.inf
    budget = torch.tensor([5.0, 2.0, torch.inf], dtype=torch.float64)
    inputs = scores, budget
    for solver in ("exact", "iterative"):

        def door(scores: Tensor, budget: Tensor, solver: str = solver) -> Tensor:
            return soft_topk(scores, budget, eps=0.5, solver=solver, n_iters=60)

        weights, tangent = jvp(door, inputs, (torch.ones_like(scores), torch.zeros_like(budget)))
        assert_within(weights, torch.tensor([[1.0], [0], [1]]).expand(3, 4), 1e-6, "λ")
        assert_within(tangent, torch.zeros(3, 4), 1e-6, "tangent")
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        for tensor in torch.autograd.grad(door(*leaves).sum(), leaves, create_graph=True):
            assert_within(tensor, torch.zeros_like(tensor), 1e-5, "gradient")


@pytest.mark.parametrize("name", ["rows", "attention"])
def test_the_published_operator_refuses_a_transform(name: str) -> None:
    door, inputs = CALLS[name]("iterative", "colt5")
    first, *others = inputs
    for transform, given in ((vmap, first[None]), (jacfwd, first), (jacrev, first)):
        with pytest.raises(ValueError, match=r"is not made for .*; choose backend 'torch'"):
            transform(lambda x: door(x, *others))(given)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_autocast_gives_the_dtype_of_sdpa_and_rounds_only_the_output(backend: str, dtype: torch.dtype) -> None:
    """A product of scores in bf16 would be divided by a small ε."""
    _, inputs = attention("iterative")
    query, key, value = (tensor.to(DEVICE, dtype) for tensor in inputs[:3])
    settings = {"eps": 0.02, "backend": backend}
    outside = soft_topk_attention(query, key, value, 1.7, **settings)
    assert outside.dtype == dtype
    with torch.autocast(DEVICE, torch.bfloat16):
        whole = key.expand_as(query[:, :, :1].expand(-1, -1, 5, -1))
        expected = F.scaled_dot_product_attention(query, whole, whole).dtype
        output = soft_topk_attention(query, key, value, 1.7, **settings)
        leaf = value.clone().requires_grad_()
        soft_topk_attention(query, key, leaf, 1.7, **settings).sum().backward()
    assert output.dtype == expected == (torch.float64 if dtype == torch.float64 else torch.bfloat16)
    assert torch.equal(output, outside.to(expected))
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype


def test_autocast_changes_nothing_else_of_the_published_operator() -> None:
    door, inputs = attention("iterative", "colt5")
    expected = door(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(door(*inputs), expected.bfloat16())


def test_autocast_lets_the_kernels_take_several_dtypes() -> None:
    """As when queries come from a norm, in float32, and values from a product, in bf16."""
    _, inputs = attention("exact")
    query, key, value = (tensor.to(DEVICE) for tensor in inputs[:3])
    with torch.autocast(DEVICE, torch.bfloat16):
        output = soft_topk_attention(query, key, value.bfloat16(), 1.7, backend="triton")
    rounded = (tensor.bfloat16() for tensor in (query, key, value))
    assert torch.equal(output, soft_topk_attention(*rounded, 1.7, backend="triton"))
