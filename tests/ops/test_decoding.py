"""Decoding against float64: on a GPU where there is one, elsewhere by the kernels in Triton's interpreter.

What lies behind the keys of a row is NaN where a kernel takes it, which may not read it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.ops import decode_attention, soft_topk_attention
from cda_cli.ops.decoding import DecodingInputs
from cda_cli.ops.solve_spec import SolveSpec
from cda_cli.ops.triton.decoding_launches import LARGEST_K, LONGEST_ROW, decode
from tests.ops.attention_problems import Problem, expect, plain, problem
from tests.ops.cases import DEVICE, UNIT, assert_within, random_rows

HALF = (torch.bfloat16, torch.float16)
EXACT: dict[str, Any] = {}
ITERATIVE: dict[str, Any] = {"solver": "iterative", "n_iters": 25}  # Most iterations are at the last ε.


def of_row(this: Problem, row: int, length: int) -> Problem:
    """A row of the batch with the keys that it has."""
    one = {name: getattr(this, name)[row : row + 1] for name in ("query", "key", "value", "grad_output")}
    one |= {name: one[name][:, :, :length] for name in ("key", "value")}
    return this._replace(**one, budget=this.budget.expand(this.query.shape[:3])[row : row + 1])


def decoded(this: Problem, lengths: Tensor | None = None, backend: str = "triton", **changed: Any) -> Tensor:
    """What the door gives, on the CPU."""
    query, key, value = (tensor.to(DEVICE) for tensor in this[:3])
    numbers = {"eps": this.eps, "scale": this.scale, "largest_k": this.budget.max().item()} | changed
    if "solver" in changed:
        in_one = key.shape[2] <= LONGEST_ROW and key.shape[3] <= 256
    else:
        in_one = numbers["largest_k"] <= LARGEST_K
    if lengths is not None and backend == "triton" and in_one:
        behind = torch.arange(key.shape[2]) >= lengths.unsqueeze(1)
        key, value = (x.masked_fill(behind[:, None, :, None].to(DEVICE), torch.nan) for x in (key, value))
    lengths = None if lengths is None else lengths.to(DEVICE)
    k = this.budget.to(DEVICE) if this.budget.dim() else this.budget.item()
    return decode_attention(query, key, value, lengths, k, **numbers, backend=backend).cpu()


def in_pytorch(this: Problem, dtype: torch.dtype, how: dict[str, Any]) -> Tensor:
    """The output by the solver in plain PyTorch, in this dtype. In float64 it specifies the iteration."""
    inputs = (tensor.to(dtype) for tensor in this[:3])
    return soft_topk_attention(*inputs, this.budget, eps=this.eps, scale=this.scale, backend="torch", **how)


def assert_right(this: Problem, lengths: Tensor, output: Tensor, how: dict[str, Any] = EXACT) -> None:
    """Each row against float64. In float32 by the rule of the weights, so that a row of the output is right to their
    sum times that, times the largest value. In half precision the error is at most twice that of plain PyTorch."""
    assert output.dtype == this.value.dtype
    for row, length in enumerate(lengths.tolist()):
        if not length:
            assert not output[row].any(), "an output without keys"
            continue
        one, mine = of_row(this, row, length), output[row : row + 1]
        expected = in_pytorch(one, torch.float64, how) if how else expect(one)[0]
        if output.dtype == torch.float32:
            tol = 1e-5 + 4 * UNIT * one.rows().scores.abs().max().item() / one.eps
            mass = in_pytorch(one._replace(value=torch.ones_like(one.value)), torch.float64, how).max().item()
            bound = tol * mass * one.value.abs().max().item()
            assert_within(mine, expected, bound, f"output of row {row}")
        else:
            of_plain = in_pytorch(one, output.dtype, how) if how else plain(one, False)[0]
            error = (of_plain.double() - expected).norm()
            assert (mine.double() - expected).norm() <= 2 * error, f"output of row {row}"


SHAPES = {  # B, H, T, S, D, and the key heads
    "one query": ((2, 1, 1, 140, 16), 1),
    "grouped heads": ((2, 3, 1, 140, 20), 1),
    "several queries": ((2, 1, 8, 70, 16), 1),
    "more queries than a program takes": ((1, 9, 2, 70, 16), 1),
}
BUDGETS: dict[str, float | tuple[float, ...]] = {
    "k = 1": 1.0, "k = 2": 2.0, "k = 16": 16.0, "any k": 40.0, "k of each query": (0.4, 1.0, 1.7, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_unequal_length(name: str, budget: str, backend: str) -> None:
    """One row is full, and one is so short that its first query sees one key."""
    shape, key_heads = SHAPES[name]
    this = problem(shape, 1.0, key_heads=key_heads, eps=0.1)
    k = torch.tensor(BUDGETS[budget])
    count = torch.Size(shape[:3]).numel()
    this = this._replace(budget=k.repeat(count // len(k) + 1)[:count].view(shape[:3]) if k.dim() else k)
    lengths = torch.tensor([shape[3], shape[2]])[: shape[0]]
    assert_right(this, lengths, decoded(this, lengths, backend))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("width", [16, 272])
def test_the_iterative_solver(backend: str, width: int) -> None:
    """No tile holds heads of 272 channels."""
    this = problem((2, 4, 1, 40, width), 3.0, key_heads=2, eps=0.1)
    how, lengths = ITERATIVE | {"n_iters": 12}, torch.tensor([33, 2])
    assert_right(this, lengths, decoded(this, lengths, backend, largest_k=None, **how), how)


@pytest.mark.parametrize("keys", [LONGEST_ROW, LONGEST_ROW + 1])
def test_the_longest_row_that_iterates_in_one_program_and_a_longer_one(keys: int) -> None:
    this, lengths = problem((1, 1, 1, keys, 1), 2.0, eps=0.1), torch.tensor([keys - 1])
    assert_right(this, lengths, decoded(this, lengths, **ITERATIVE), ITERATIVE)


@pytest.mark.parametrize("how", [EXACT, ITERATIVE])
@pytest.mark.parametrize("name", ["one query", "several queries"])
@pytest.mark.parametrize("k", [1.0, 2.0, 5.0] if DEVICE == "cuda" else [2.0])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: torch.dtype, k: float, name: str, how: dict[str, Any]) -> None:
    shape, key_heads = SHAPES[name]
    this = problem(shape, k, key_heads=key_heads, dtype=dtype)
    lengths = torch.tensor([shape[3] - 1, 9])
    assert_right(this, lengths, decoded(this, lengths, **how), how)


@pytest.mark.parametrize("width", [1, 24, 33, 64, 80, 128, 256] if DEVICE == "cuda" else [33])
@settings(max_examples=25 if DEVICE == "cuda" else 6)
@given(data=st.data())
def test_any_shape_k_and_lengths(width: int, data: st.DataObject) -> None:
    B, G, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    T, S = data.draw(st.integers(1, 8), "T"), data.draw(st.integers(1, 140), "S")
    k = data.draw(st.one_of(st.floats(2.0**-8, 16), st.integers(1, 16).map(float)), "k")
    of_each = (B, G * group, T) if data.draw(st.booleans(), "a k of each query") else k
    seed, eps = data.draw(st.integers(0, 2**32)), data.draw(st.floats(0.02, 2.0), "ε")
    this = problem((B, G * group, T, S, width), of_each, seed=seed, eps=eps, key_heads=G)
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, S), min_size=B, max_size=B), "lengths"))
    assert_right(this, lengths, decoded(this, lengths))
    how = ITERATIVE | {
        "n_iters": data.draw(st.integers(1, 30), "n_iters"), "eps_init": data.draw(st.floats(0.01, 8.0), "eps_init"),
        "eps_decay": data.draw(st.one_of(st.just(1.0), st.floats(0.1, 1.0)), "eps_decay"),
    }  # fmt: skip
    assert_right(this, lengths, decoded(this, lengths, **how), how)


def hard_rows(n: int) -> dict[str, Tensor]:
    """[3, n]"""
    rows = random_rows(3, n)
    led, two_led, one_slot = rows.clone(), rows.clone(), rows.clone()
    led[:, 7] += 100.0
    two_led[:, 13] += 100.0
    two_led[:, 49] += 300.0
    one_slot[:, 1::16] += torch.arange(1, n, 16) / 10 + 3
    stairs = torch.arange(n).expand(3, -1) * torch.tensor([[0.01], [0.1], [-0.1]])
    tied = torch.tensor([3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0, 0.0, 0.0, -1.0]).repeat(n // 10 + 1)[:n].expand(3, -1)
    return {
        "all equal": torch.zeros(3, n), "ties": tied, "one leads by 1000 eps": led, "two lead by far": two_led,
        "large scores of one slot": one_slot, "stairs": stairs, "a wide spread": rows * 50,
    }  # fmt: skip


@pytest.mark.parametrize("k", [2.0, 5.0])
@pytest.mark.parametrize("name", hard_rows(64))
def test_hard_rows(name: str, k: float) -> None:
    """A head for each row of scores: the keys are unit vectors, the queries are the scores."""
    scores = hard_rows(64)[name]
    value = random_rows(1, 3, 64, 64, seed=7)
    key = torch.eye(64).expand(1, 3, -1, -1)
    this = Problem(scores[None, :, None], key, value, torch.tensor(k), scores[None, :, None], 0.1, 1.0, False)
    for how in (EXACT, ITERATIVE, ITERATIVE | {"eps_init": 0.1}):  # At the same ε throughout, a starts far below.
        assert_right(this, torch.tensor([64]), decoded(this, **how), how)


@pytest.mark.parametrize("T", [1, 3])
def test_the_door_of_attention_decodes_too(T: int) -> None:
    """Few queries without a gradient, where a bound of k is known."""
    this = problem((1, 1, T, 40, 16), (1, 1, T), eps=0.1)
    inputs = [tensor.to(DEVICE) for tensor in this[:4]]
    numbers = {"eps": this.eps, "largest_k": this.budget.max().item()}
    output = soft_topk_attention(*inputs, **numbers, backend="triton").cpu()
    assert torch.equal(output, decoded(this))


@pytest.mark.parametrize("H", [1, 2])
@pytest.mark.parametrize("k", [2.0, 3.0])
def test_a_budget_without_meaning_or_beyond_the_bound_makes_its_query_nan(H: int, k: float) -> None:
    budgets = torch.tensor([-1.0, 0.0, torch.nan, 9.0, 1.0, k])
    this = problem((6, H, 1, 20, 16), 1.0, key_heads=1)._replace(budget=budgets.view(6, 1, 1).expand(6, H, 1))
    inputs = DecodingInputs(*(x.to(DEVICE) for x in this[:3]), None, this.budget.to(DEVICE), k,
                            SolveSpec("exact", this.eps), this.scale)  # fmt: skip
    output = decode(inputs).cpu()
    assert output[:4].isnan().all()
    assert_right(Problem(*(x[4:] for x in this[:5]), *this[5:]), torch.tensor([20, 20]), output[4:])


@pytest.mark.parametrize("k", [1.0, 2.0, 3.0])
def test_a_nan_query_or_key_shows_in_the_output(k: float) -> None:
    this = problem((1, 2, 1, 70, 16), k)
    for name in ("query", "key"):
        spoilt = getattr(this, name).clone()
        spoilt[0, 1, -1, 3] = torch.nan
        for how in (EXACT, ITERATIVE):
            output = decoded(this._replace(**{name: spoilt}), **how)
            assert output[0, 1].isnan().all(), name
            assert output[0, 0].isfinite().all()


@pytest.mark.parametrize(
    ("shape", "k", "how"),
    [((2, 1, 1, 150, 20), 2.0, EXACT), ((2, 1, 3, 150, 20), 6.0, EXACT), ((2, 1, 2, 150, 20), 6.0, ITERATIVE)],
)
def test_nothing_is_read_that_was_not_written(
    fenced: list[Tensor], shape: tuple[int, int, int, int, int], k: float, how: dict[str, Any]
) -> None:
    """A second call gives the same bits: the arrivals of the first are zero again."""
    this = problem(shape, k, key_heads=1)
    lengths = torch.tensor([150, 66])
    first, second = (decoded(this, lengths, **how) for _ in range(2))
    assert len(fenced) >= 4, "the launch makes its tensors in another way: this test sees nothing"
    assert first.isfinite().all()
    assert torch.equal(first, second)


@pytest.mark.parametrize("how", [EXACT, ITERATIVE])
@pytest.mark.parametrize("lengths", [[-3, 1000], [0, 40]])
def test_lengths_that_no_one_may_look_at_read_no_other_key(lengths: list[int], how: dict[str, Any]) -> None:
    """They are on the device: below nothing is nothing, and beyond all keys is all of them."""
    this = problem((2, 2, 1, 40, 16), 2.0)
    output = decoded(this, torch.tensor(lengths, dtype=torch.int32), **how)
    assert_right(this, torch.tensor([0, 40]), output, how)


@pytest.mark.parametrize(("k", "how"), [(2.0, EXACT), (4.0, EXACT), (2.0, ITERATIVE)])
def test_lengths_may_change_between_the_runs_of_a_graph(k: float, how: dict[str, Any]) -> None:
    """The launch does not depend on them. Without a GPU there is no graph, and each run is a call."""
    this = problem((2, 1, 1, 140, 16), k)
    inputs = [tensor.to(DEVICE) for tensor in this[:3]]
    lengths = torch.full((2,), 140, device=DEVICE)

    def call() -> Tensor:
        return decode_attention(*inputs, lengths, k, eps=this.eps, backend="triton", **how)

    run = call
    if DEVICE == "cuda":
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call()

        def run() -> Tensor:
            graph.replay()
            return output

    for now in ([140, 140], [1, 77], [128, 64]):
        lengths.copy_(torch.tensor(now))
        assert_right(this, torch.tensor(now), run().cpu(), how)


@pytest.mark.parametrize("how", [EXACT, ITERATIVE])
def test_numbers_may_be_whole_ones(how: dict[str, Any]) -> None:
    """A launch keeps the kernel that was compiled at first, which may not hold the numbers of that call."""
    this, lengths = problem((2, 1, 1, 36, 16), 2.0), torch.tensor([36, 9])
    for eps, scale in ((1, 1), (0.25, 0.5), (1, 0.5), (0.25, 1)):
        one = this._replace(eps=eps, scale=scale)
        assert_right(one, lengths, decoded(one, lengths, **how), how)
    learned = problem((2, 1, 1, 36, 16), (2, 1, 1))
    for bound in (9, 9.0):
        assert_right(learned, lengths, decoded(learned, lengths, **how | {"largest_k": bound}), how)


def test_other_scales_dtypes_and_strides() -> None:
    """A scale that is not above 0; keys and values that are slices of a longer cache, in another order."""
    for scale in (-0.4, 0.0):
        this = problem((1, 1, 1, 40, 16), 2.0, scale=scale)
        assert_within(decoded(this), expect(this)[0], 1e-4, f"scale {scale}")
    this = problem((1, 2, 1, 40, 16), 2.0)
    longer = torch.zeros(1, 64, 2, 2, 16, device=DEVICE)
    longer[:, :40, 0], longer[:, :40, 1] = (x.transpose(1, 2).to(DEVICE) for x in (this.key, this.value))
    key, value = (x.transpose(1, 2)[:, :, :40] for x in longer.unbind(2))
    output = decode_attention(this.query.to(DEVICE), key, value, None, 2.0, eps=this.eps, backend="triton")
    assert_within(output, expect(this)[0], 1e-5, "output")
    double = problem((2, 2, 1, 40, 16), 2.0, dtype=torch.float64)
    assert_within(decoded(double, backend="torch"), expect(double)[0], 1e-12, "float64")


def test_compiled_it_is_the_same() -> None:
    """One graph without a break, and the rules of torch for a registered operator."""
    this = problem((2, 2, 1, 40, 16), (2, 2, 1))
    lengths = torch.tensor([40, 13], device=DEVICE)

    def function(query: Tensor, key: Tensor, value: Tensor, budget: Tensor, lengths: Tensor) -> Tensor:
        return decode_attention(query, key, value, lengths, budget, eps=0.2, largest_k=9, backend="triton") + 1

    inputs = [tensor.to(DEVICE) for tensor in this[:4]]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs, lengths), function(*inputs, lengths))
    torch.library.opcheck(
        torch.ops.cda.decode_attention.default, (*inputs[:3], lengths, inputs[3], 9.0, 9.0, 3.0),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"query_BHTD": torch.zeros(2, 2, 9, 8)}, ValueError, "at most 8 queries of each head, not 9"),
        ({"lengths_B": torch.ones(3).long()}, ValueError, r"lengths must be \[B\] = \(2,\), not \(3,\)"),
        ({"lengths_B": torch.ones(2)}, TypeError, "lengths must be a tensor of whole numbers"),
        ({"lengths_B": torch.ones(2, device="meta").long()}, ValueError, "lengths is on meta and must be on cpu"),
        ({"sparsity_k": 0.0}, ValueError, "sparsity_k must be greater than 0"),
        ({"sparsity_k": torch.tensor(-1.0)}, ValueError, "greater than 0 in every row"),
        ({"eps": 0.0}, ValueError, "eps must be greater than 0"),
        ({"scale": torch.inf}, ValueError, "scale must be finite"),
        ({"largest_k": 0.0}, ValueError, "largest_k must be greater than 0"),
        ({"backend": "colt5"}, ValueError, "has no exact solver"),
    ],
)
def test_what_has_no_meaning_is_refused(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    tensors = {"query_BHTD": torch.zeros(2, 2, 1, 8)} | dict.fromkeys(
        ("key_BGSD", "value_BGSD"), torch.zeros(2, 2, 5, 8)
    )
    with pytest.raises(kind, match=message):
        decode_attention(**({"lengths_B": None, "sparsity_k": 2.0, "eps": 0.1} | tensors | changed))
