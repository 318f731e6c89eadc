"""The fused attention against float64: on a GPU where there is one, elsewhere in Triton's interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cda_cli.ops import reference_soft_topk, soft_topk_attention
from cda_cli.ops.triton.fused_attention import fused_attention, fused_attention_backward
from tests.ops.attention_problems import (
    ANNEALING,
    CASES,
    NAMES,
    assert_at_most_twice_plain,
    assert_close,
    differentiable_problem,
    expect,
    fused,
    fused_output,
    moved,
    packed,
    plain,
    problem,
    run,
    smooth,
    with_scores,
)
from tests.ops.cases import DEVICE, UNIT, assert_within, random_rows

HALF = (torch.bfloat16, torch.float16)
# On a GPU each dtype is a kernel of its own. The interpreter runs the same source, which float32 holds to the tightest
# bounds; other tests take the half precisions there.
DTYPES = (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)


@pytest.mark.parametrize("name", CASES)
def test_float32_output_and_every_gradient(name: str) -> None:
    """The output keeps the rule of the weights too, which are right to 1e-5 + 4u·max|s|/ε. So its rows are right to k
    times that, times the largest value."""
    this = CASES[name]
    found, expected = fused(this), expect(this)
    assert_close(found, expected, 1e-4, this)
    tol = 1e-5 + 4 * UNIT * this.rows().scores.abs().max().item() / this.eps
    bound = tol * this.budget.max().item() * this.value.abs().max().item()
    assert_within(found[0], expected[0], bound, "output, by the rule of the weights")


WIDTHS = (16, 32, 64, 80, 96, 128, 256)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_head_width(width: int, dtype: torch.dtype) -> None:
    """With lengths that no tile divides, keys in front, grouped heads and a learned budget."""
    this = problem((1, 2, 75, 90, width), (1, 2, 75), dtype=dtype, key_heads=1, eps=0.3)
    assert_at_most_twice_plain(this, fused(this))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF] if DEVICE == "cuda" else [torch.float32])
@pytest.mark.parametrize("k", [1.0, 1.5, 2.0, 3.0, 8.0, 16.0, 40.0])
def test_every_budget(k: float, dtype: torch.dtype) -> None:
    this = differentiable_problem((1, 2, 131, 131, 32), k, dtype=dtype)
    assert_at_most_twice_plain(this, fused(this))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("k", [2.0, 6.0])
def test_packed_documents(causal: bool, dtype: torch.dtype, k: float) -> None:
    """Some longer than a tile, some of one token, starting where they will."""
    documents = torch.stack((packed(70, 1, 2, 80, 40), packed(3, 130, 60)))
    this = differentiable_problem((2, 2, 150, 193, 16), k, dtype=dtype, causal=causal, documents=documents)
    assert_at_most_twice_plain(this, fused(this))


@pytest.mark.parametrize("D", [1, 8, 24, 33] if DEVICE == "cuda" else [1, 33])  # each is a compilation of every kernel
@settings(max_examples=15 if DEVICE == "cuda" else 5)
@given(data=st.data())
def test_any_shape_as_the_torch_backend(D: int, data: st.DataObject) -> None:
    """In float32, both backends on the same tensors: output and every gradient."""
    B, group, G = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    T, S = (data.draw(st.integers(1, 70), name) for name in "TS")
    H = G * group
    budget = data.draw(st.sampled_from((1.0, 2.0, 5.5, (B, H, T), (H, 1))))
    documents = None
    if T <= S and data.draw(st.booleans()):
        documents = torch.rand(B, S, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < 0.1
        documents = documents.cumsum(1)
    this = problem(
        (B, H, T, S, D),
        budget,
        eps=data.draw(st.floats(0.05, 4.0)),
        causal=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**32)),
        key_heads=G,
        documents=documents,
    )
    actual, expected = fused(this), run(this, backend="torch")
    if not smooth(this, 1e-4):
        actual, expected = actual[:1], expected[:1]
    least = 1e-2 / min(this.eps, 1.0)  # what a gradient is made of: differences, divided by ε, of numbers near 1
    for name, mine, theirs in zip(NAMES, actual, expected, strict=False):
        assert_within(mine, theirs, 3e-4 * theirs.abs().max().clamp(min=least).item(), name)


def hard_rows() -> dict[str, Tensor]:
    rows = random_rows(3, 200)
    equal = torch.zeros(3, 200)
    tied = torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0, -1.0]).repeat(20).roll(3).expand(2, -1).clone()
    led = rows.clone()
    led[:, 77] += 100.0
    two_led = led.clone()
    two_led[:, 13] += 300.0
    one_class = rows.clone()
    for place in (5, 37, 69, 101, 133, 165):  # one class of keys, whatever the width of a tile up to 32
        one_class[:, place] = 4 + place / 100
    far = rows + 1000.0
    # The sums of a first pass overflow in the first row. In the last one they nearly do: a capped entry is 2^121 times
    # as large as the late ones, and the two of its class before it are 2^128 times as large.
    descent = rows.sort(descending=True).values * torch.tensor([[50.0], [3.0], [0.0]])
    bits = torch.full((96,), 115.0)
    bits[[5, 37, 69]] = torch.tensor([128.0, 128.0, 121.0])
    descent[2, :96] = bits * 0.1 * math.log(2)
    return {
        "all equal": equal, "ties": tied, "one leads by 1000 eps": led, "two lead by far": two_led,
        "many large scores of one class": one_class, "far from zero": far, "a wide descent": descent,
    }  # fmt: skip


@pytest.mark.parametrize("k", [1.0, 1.7, 2.0, 3.0, 5.0, 9.5])
@pytest.mark.parametrize("name", hard_rows())
def test_hard_rows(name: str, k: float) -> None:
    """The inputs that the accuracy rules name, in float32: the output under the rule of the weights."""
    this = with_scores(hard_rows()[name], k, 0.1)
    tol = 1e-5 + 4 * UNIT * this.query.abs().max().item() / this.eps
    assert_within(fused_output(this), expect(this)[0], tol * k * this.value.abs().max().item(), "output")


def test_large_scores_of_few_classes_in_half_precision() -> None:
    """In whole tiles of 64 keys: three of a class, of each of two in a part, and a third that would drown its part."""
    rows = random_rows(3, 256)
    rows[0, [5, 69, 133]] = torch.tensor([4.0, 4.01, 4.02])
    rows[1, [5, 69, 133, 13, 77, 141]] = torch.tensor([4.0, 4.01, 4.02, 4.03, 4.04, 4.05])
    rows[2, [197, 13, 77, 141, 205]] = 3.5
    rows[2, [5, 69, 133]] = torch.tensor([6.0, 6.01, 6.02])
    this = with_scores(rows, 8.0, 0.1)
    names = ("query", "key", "value", "grad_output")
    this = this._replace(**{name: getattr(this, name).bfloat16() for name in names})
    assert_at_most_twice_plain(this, [fused_output(this)])


@pytest.mark.parametrize("k", [2.0, 5.0])
@pytest.mark.parametrize("name", ["all equal", "one leads by 1000 eps", "many large scores of one class"])
def test_gradients_of_hard_rows(name: str, k: float) -> None:
    this = with_scores(hard_rows()[name] * torch.tensor([[1.0], [0.9], [1.1]]), k, 0.1)
    assert_close(fused(this), expect(this), 1e-3, this)


def test_a_row_beyond_the_bound_of_k_is_nan_and_the_others_are_right() -> None:
    """Never a silently wrong result."""
    this = problem((1, 2, 90, 90, 16), (1, 2, 90))
    beyond = this.budget > 2
    assert beyond.any()
    assert not beyond.all()
    output = fused_output(this, largest_k=2.0)
    assert output[beyond].isnan().all()
    within = output[~beyond]
    expected = run(this, backend="torch")[0][~beyond]
    assert_within(within, expected, 1e-5 * expected.abs().max().item(), "output")


THRESHOLDS = ("a budget of each query", "k larger than the visible keys", "grouped heads", "documents")


@pytest.mark.parametrize("name", THRESHOLDS)
def test_the_weights_follow_from_the_threshold(name: str) -> None:
    this = CASES[name]
    inputs = [tensor.to(DEVICE) for tensor in this[:4]]
    _, threshold = soft_topk_attention(*inputs, **this.settings(DEVICE), backend="triton", return_threshold=True)
    rows = this.rows()
    budget = this.budget.double().expand(rows.scores.shape[:-1])
    exponent = (rows.scores + threshold.double().cpu().unsqueeze(-1)) / this.eps
    expected = reference_soft_topk(rows.scores, budget, this.eps, rows.mask)
    assert torch.equal(threshold.cpu().isinf(), expected.threshold.isinf())
    tol = 1e-5 + 4 * UNIT * rows.scores.abs().max().item() / this.eps
    assert_within(exponent.clamp(max=0).exp() * this.seen(), expected.weights, tol, "λ from the threshold")


def test_training_and_inference_give_the_same_output() -> None:
    """Training sums the capped and the free values apart."""
    this = problem((1, 2, 90, 90, 32), 2.0)
    inputs = [tensor.to(DEVICE) for tensor in this[:4]]
    output = soft_topk_attention(*inputs, **this.settings(), backend="triton")
    assert_within(output.cpu(), fused_output(this), 1e-5, "output")


def test_no_bit_of_an_output_depends_on_values_that_its_query_does_not_see() -> None:
    """Not of queries that see no more than k keys either, of which every weight is 1."""
    this = problem((1, 2, 40, 40, 16), 9.0, dtype=torch.bfloat16)
    later = this.value.clone()
    later[:, :, 20:] *= -1000.0
    assert torch.equal(fused_output(this)[:, :, :20], fused_output(this._replace(value=later))[:, :, :20])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "heads"), [(1, 4), (3, 4), (3, 46)])
@pytest.mark.parametrize("documents", [None, packed(60, 71).expand(2, -1)])
def test_a_few_queries_against_a_cache(T: int, heads: int, documents: Tensor | None, dtype: torch.dtype) -> None:
    """Decoding: without gradients, over blocks of keys; as plain PyTorch, and the threshold too. Up to 69 queries share
    a key head, which is more than a program takes."""
    this = problem((2, heads, T, 131, 24), (2, heads, T), dtype=dtype, key_heads=2, documents=documents)
    inputs = [tensor.to(DEVICE) for tensor in this[:4]]
    output, threshold = soft_topk_attention(*inputs, **this.settings(DEVICE), backend="triton", return_threshold=True)
    expected = expect(this)[0]
    error = (plain(this, False)[0].double() - expected).norm()
    assert output.dtype == dtype
    assert (output.cpu().double() - expected).norm() <= 2 * error
    _, exact = soft_topk_attention(*inputs, **this.settings(DEVICE), backend="torch", return_threshold=True)
    assert_within(threshold, exact, 1e-4, "threshold")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest_k", [2.0, None])
@pytest.mark.parametrize("causal", [True, False])
def test_calls_that_share_a_layout_share_nothing_else(
    causal: bool, largest_k: float | None, dtype: torch.dtype
) -> None:
    """Its kernels are launched again with other tensors, ε and scale; and with pointers that they were not made for."""
    T = 80 if DEVICE == "cuda" else 40  # The interpreter has no compiled kernels to mix up; two tiles will do there.
    shape = (1, 2, T, T, 16)
    one = differentiable_problem(shape, 1.7, dtype=dtype, causal=causal, key_heads=1)
    other = differentiable_problem(shape, 2.0, dtype=dtype, causal=causal, key_heads=1, eps=0.7, scale=0.4)
    for this in (one, other, moved(one, 1), one, moved(other, 8), other):
        inputs = [tensor.to(DEVICE).requires_grad_() for tensor in this[:4]]
        output = soft_topk_attention(*inputs, **this.settings(), backend="triton", largest_k=largest_k)
        grads = torch.autograd.grad(output, inputs, this.grad_output.to(DEVICE))
        expected = expect(one if this.eps == one.eps else other)
        assert_close(
            [x.detach().cpu() for x in (output, *grads)], expected, 2e-5 if dtype == torch.float32 else 2**-6, this
        )


@pytest.mark.parametrize("k", [0.7, 2.0, 5.0])
def test_a_number_for_k_gives_the_bits_of_a_tensor_of_it(k: float) -> None:
    """They are other kernels of one layout."""
    this = problem((1, 2, 21, 21, 16), k, dtype=torch.bfloat16)
    found = []
    for budget in (k, torch.full((1, 2, 21), k, device=DEVICE), k):
        heads = [tensor.to(DEVICE).requires_grad_() for tensor in this[:3]]
        output = soft_topk_attention(*heads, budget, **this.settings(), backend="triton", largest_k=k)
        found.append((output, *torch.autograd.grad(output, heads, this.grad_output.to(DEVICE))))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_the_backward_is_deterministic() -> None:
    this = problem((1, 4, 150, 150, 16), 2.0, dtype=torch.bfloat16, key_heads=2)
    first, second = fused(this), fused(this)
    for name, one, other in zip(NAMES, first, second, strict=True):
        assert torch.equal(one, other), name


def test_a_nan_query_or_key_shows_in_the_output() -> None:
    query, key, value = (random_rows(1, 1, 70, 16, seed=seed).to(DEVICE) for seed in range(3))
    spoilt = query.clone()
    spoilt[0, 0, 40, 3] = torch.nan
    output = soft_topk_attention(spoilt, key, value, 2.0, backend="triton")
    assert output[0, 0, 40].isnan().all()
    assert output[0, 0, 41:].isfinite().all()
    spoilt = key.clone()
    spoilt[0, 0, 40, 3] = torch.nan
    output = soft_topk_attention(query, spoilt, value, 2.0, backend="triton")
    assert output[0, 0, :40].isfinite().all()
    assert output[0, 0, 40:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_element_is_written_and_nothing_else(fenced: list[Tensor], dtype: torch.dtype) -> None:
    this = problem((2, 2, 67, 71, 20), (2, 2, 67), dtype=dtype, key_heads=1)
    for name, tensor in zip(NAMES, fused(this), strict=True):
        assert tensor.isfinite().all(), f"{name} has an element that nothing wrote"
    assert len(fenced) >= 6, "the operator makes its tensors in another way: this test sees nothing"


def samples(dtype: torch.dtype, documents: Tensor | None) -> tuple[object, ...]:
    """Arguments of the registered operator, with heads that are views, as a model makes them."""
    this = problem((2, 4, 20, 23, 16), (2, 4, 20), dtype=dtype, key_heads=2)
    heads = [x.to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in this[:3]]
    documents = None if documents is None else documents.to(DEVICE)
    return *heads, this.budget.to(DEVICE).requires_grad_(), documents, 0.2, 0.25, True, False, True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("documents", [None, packed(9, 14).expand(2, -1)])
def test_the_registered_operators_keep_the_rules_of_torch(dtype: torch.dtype, documents: Tensor | None) -> None:
    """Schema, fake shapes and strides, autograd registration; of the backward, what a gradient needs not."""
    arguments = samples(dtype, documents)
    torch.library.opcheck(
        fused_attention, arguments, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )
    with torch.no_grad():
        query, key, value, _, documents, eps, scale, causal, *_ = arguments
        output, stats, _, free = fused_attention(*arguments)
        summed = free if free.numel() else output
        backward = output, query, key, value, summed, stats, None, documents, eps, scale, causal
        torch.library.opcheck(fused_attention_backward, backward, test_utils=("test_schema", "test_faketensor"))


class Operators(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [2.0, 6.0])
def test_a_dispatch_mode_sees_the_operators_and_changes_no_bit(k: float) -> None:
    """Without one, a call does without their registration."""
    this = problem((1, 2, 20, 23, 16), k, dtype=torch.bfloat16)
    with Operators() as seen:
        observed = fused(this, largest_k=k)
    assert seen.names >= {"cda::fused_attention", "cda::fused_attention_backward"}
    for name, mine, theirs in zip(NAMES, fused(this, largest_k=k), observed, strict=True):
        assert torch.equal(mine, theirs), name


def test_tensors_without_numbers_launch_nothing() -> None:
    """The fake tensors of a forecast of memory: shapes and strides, forward and backward."""
    real = torch.zeros(2, 3, 10, 16, device=DEVICE, requires_grad=True)
    output = soft_topk_attention(real, real, real, 2.0, backend="triton")
    with FakeTensorMode():
        fake = torch.zeros(2, 3, 10, 16, device=DEVICE, requires_grad=True)
        result = soft_topk_attention(fake, fake, fake, 2.0, backend="triton")
        (grad,) = torch.autograd.grad(result, fake, torch.ones_like(result))
        decoded = soft_topk_attention(fake[:, :, :1].detach(), fake.detach(), fake.detach(), 2.0, backend="triton")
    for made in (result, grad, decoded):
        assert isinstance(made, FakeTensor)
    assert (result.shape, result.stride()) == (output.shape, output.stride())
    assert grad.shape == fake.shape
    assert decoded.shape == (2, 3, 1, 16)


def test_compiled_attention_equals_eager_attention() -> None:
    """One graph without a break, with the same values and gradients."""

    def function(query: Tensor, key: Tensor, value: Tensor, budget: Tensor) -> Tensor:
        heads = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        output = soft_topk_attention(*heads, budget, eps=0.3, backend="triton", largest_k=2)
        return output.transpose(1, 2).flatten(2) + 1

    inputs = [random_rows(2, 9, 3, 8, seed=seed).to(DEVICE) for seed in range(3)]
    inputs.append(1 + random_rows(2, 3, 9, seed=5).abs().clamp(max=1).to(DEVICE))
    results = []
    for door in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = door(*leaves)
        results.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])
    for name, eager, compiled in zip(NAMES, *results, strict=True):
        assert_within(compiled.cpu(), eager.cpu(), 1e-6, name)


def test_the_iterative_solver_runs_on_the_row_kernels() -> None:
    """In blocks of queries, equal to the torch backend."""
    this = problem((1, 2, 40, 44, 8), (1, 2, 40), documents=packed(13, 31)[None])
    expected = run(this, backend="torch", solver="iterative", **ANNEALING)
    for name, mine, theirs in zip(NAMES, fused(this, solver="iterative", **ANNEALING), expected, strict=True):
        assert_within(mine, theirs, 1e-4 * theirs.abs().max().item(), name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": (1, 3, 9, 8)}, "H a multiple of G"),
        ({"value": (1, 2, 8, 8)}, "do not fit"),
        ({"documents": (1, 8)}, "documents must be"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, tuple[int, ...]], message: str) -> None:
    shapes = {"query": (1, 4, 9, 8), "key": (1, 2, 9, 8), "value": (1, 2, 9, 8)} | change
    tensors = {name: random_rows(*shape) for name, shape in shapes.items()}
    if "documents" in tensors:
        tensors["documents"] = tensors["documents"].long()
    with pytest.raises(ValueError, match=message):
        soft_topk_attention(tensors["query"], tensors["key"], tensors["value"], 2.0, documents=tensors.get("documents"))
