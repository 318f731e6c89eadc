"""soft_topk_attention against dense float64 attention: output, threshold and every gradient; blocks; memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cda_cli.ops import reference_soft_topk, soft_topk, soft_topk_attention
from tests.ops.attention_problems import (
    ANNEALING,
    CASES,
    NAMES,
    Problem,
    assert_close,
    expect,
    problem,
    published_weights,
    run,
    smooth,
)
from tests.ops.cases import UNIT, assert_within, random_rows

cases = pytest.mark.parametrize("name", CASES)
solvers = pytest.mark.parametrize("solver", ["exact", "iterative"])


def in_float64(this: Problem) -> Problem:
    return this._replace(**{name: getattr(this, name).double() for name in Problem._fields[:5]})


@solvers
@cases
def test_float32_output_and_every_gradient(name: str, solver: str) -> None:
    assert smooth(CASES[name], 1e-4)
    this = CASES[name]
    assert_close(run(this, solver=solver, **ANNEALING), expect(this, solver), 1e-4, this)


@cases
def test_float32_output_to_the_rule_of_the_weights(name: str) -> None:
    """Weights to 1e-5 + 4u·max|s|/ε, so rows of the output to k times that, times the largest value."""
    this = CASES[name]
    tol = 1e-5 + 4 * UNIT * this.rows().scores.abs().max().item() / this.eps
    bound = tol * this.budget.max().item() * this.value.abs().max().item()
    assert_within(run(this)[0], expect(this)[0], bound, "output")


@solvers
@cases
def test_float64_output_and_every_gradient(name: str, solver: str) -> None:
    """A product or a mask in float32 anywhere leaves an error of 1e-8."""
    this = in_float64(CASES[name])
    assert_close(run(this, solver=solver, **ANNEALING), expect(this, solver), 1e-10, this)


@solvers
@given(data=st.data())
def test_any_shape_in_float64(data: st.DataObject, solver: str) -> None:
    sizes = [data.draw(st.integers(1, most), label) for most, label in zip((2, 2, 40, 40, 40), "BHTSD", strict=True)]
    budget_shape = data.draw(st.sampled_from(((), tuple(sizes[:3]), (sizes[1], 1))))
    this = problem(
        tuple(sizes),
        budget_shape,
        dtype=torch.float64,
        eps=data.draw(st.floats(0.05, 4.0)),
        causal=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**32)),
    )
    actual, expected = run(this, solver=solver, **ANNEALING), expect(this, solver)
    assert_close(actual[:1] if solver == "exact" and not smooth(this, 1e-9) else actual, expected, 1e-9, this)


def dense(this: Problem, solver: str) -> list[Tensor]:
    """The plain PyTorch way: scores in float32 from the rounded inputs, the rounding of the output at its end."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in this[:4]]
    query, key, value, budget = leaves
    scores = this.scale * query.float() @ key.float().transpose(-1, -2)
    weights = soft_topk(scores, budget, eps=this.eps, mask=this.seen(), solver=solver, **ANNEALING)
    output = (weights @ value.float()).to(value.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, this.grad_output)]


@solvers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 2, 40, 40, 16), (1, 2, 33, 47, 8), (1, 2, 25, 14, 24)])
def test_half_precision_errs_at_most_twice_as_much_as_dense_attention(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, solver: str
) -> None:
    """Against float64 on the rounded inputs. ∂L/∂k is float32 and keeps the rule of float32."""
    this = problem(shape, shape[:3], dtype=dtype)
    assert smooth(this, 1e-4)
    expected = expect(this, solver)
    actual, plain = run(this, solver=solver, **ANNEALING), dense(this, solver)
    for name, mine, theirs, exact in zip(NAMES[:4], actual, plain, expected, strict=False):
        assert mine.dtype == dtype
        error = (theirs.double() - exact).abs().max().item()
        assert_within(mine, exact, 2 * error, name)
    assert_within(actual[4], expected[4], 1e-4 * expected[4].abs().max().item(), NAMES[4])


@solvers
@cases
def test_the_weights_follow_from_the_threshold(name: str, solver: str) -> None:
    """min(1, exp((s + a)/ε)) over the visible keys, at the last ε of the annealing; a carries no gradient."""
    this = CASES[name]
    query = this.query.clone().requires_grad_()
    output, threshold = soft_topk_attention(
        query,
        *this[1:4],
        eps=this.eps,
        scale=this.scale,
        causal=this.causal,
        documents=this.documents,
        solver=solver,
        return_threshold=True,
        **ANNEALING,
    )
    assert output.requires_grad
    assert not threshold.requires_grad
    assert threshold.shape == query.shape[:3]
    rows = this.rows()
    budget = this.budget.double().expand(rows.scores.shape[:-1])
    if solver == "exact":
        last_eps = this.eps
        expected = reference_soft_topk(rows.scores, budget, this.eps, rows.mask).weights
        full = this.seen().sum(-1).expand_as(budget) <= budget
        assert (threshold[full] == torch.inf).all()
        assert threshold[~full].isfinite().all()
    else:
        last_eps = max(ANNEALING["eps_init"] * ANNEALING["eps_decay"] ** ANNEALING["n_iters"], this.eps)
        expected, _, _ = published_weights(rows, budget, torch.zeros_like(rows.scores))
    exponent = (rows.scores + threshold.double().unsqueeze(-1)) / last_eps
    weights = exponent.clamp(max=0).exp() * this.seen()
    tol = 1e-5 + 4 * UNIT * rows.scores.abs().max().item() / last_eps
    assert_within(weights, expected, tol, "λ from the threshold")


@solvers
def test_a_query_that_sees_nothing_gives_zero_and_moves_nothing(solver: str) -> None:
    """Its gradients are 0, and so is its budget's."""
    this = problem((2, 1, 21, 13, 6), (2, 1, 21))
    output, grad_query, _, _, grad_budget = run(this, solver=solver)
    for tensor in (output, grad_query, grad_budget):
        assert (tensor[:, :, :8] == 0).all()


@solvers
@pytest.mark.parametrize("causal", [True, False])
def test_without_any_key_the_output_is_zero(causal: bool, solver: str) -> None:
    for tensor in run(problem((2, 1, 3, 0, 6), 2.0, causal=causal), solver=solver):
        assert (tensor == 0).all()


@solvers
def test_an_empty_batch_gives_an_empty_output(solver: str) -> None:
    output, *grads = run(problem((0, 2, 3, 4, 5), 2.0), solver=solver)
    assert output.shape == (0, 2, 3, 5)
    assert all((grad == 0).all() for grad in grads)


def test_the_scale_is_that_of_attention_unless_given() -> None:
    query, key, value = (random_rows(1, 1, 6, 7, seed=seed) for seed in range(3))
    expected = soft_topk_attention(query, key, value, 2.0, scale=7**-0.5)
    assert torch.equal(soft_topk_attention(query, key, value, 2.0), expected)


def test_a_nan_query_shows_in_its_own_output_alone() -> None:
    """Also in the first query, all of whose visible keys k covers."""
    query, key, value = (random_rows(1, 2, 9, 4, seed=seed) for seed in range(3))
    sound = soft_topk_attention(query, key, value, 2.0)
    for t in (0, 1, 7):
        spoilt = query.clone()
        spoilt[0, 0, t] = torch.nan
        output = soft_topk_attention(spoilt, key, value, 2.0)
        others = torch.ones(1, 2, 9, dtype=torch.bool)
        others[0, 0, t] = False
        assert torch.equal(output[others], sound[others])
        assert output[0, 0, t].isnan().all(), f"query {t} is NaN, and its output is not"


@solvers
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("T", "S"), [(300, 300), (300, 340), (300, 111)])
def test_blocks_of_queries_do_not_show(
    T: int, S: int, causal: bool, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest blocks and one block for all give the same output and gradients."""
    this = problem((1, 2, T, S, 4), (1, 2, T), dtype=torch.float64, causal=causal)
    monkeypatch.setattr("cda_cli.ops.attention_blocks.BLOCK_SCORES_CPU", 1)
    many = run(this, solver=solver, **ANNEALING)
    monkeypatch.setattr("cda_cli.ops.attention_blocks.BLOCK_SCORES_CPU", 2**40)
    assert_close(many, run(this, solver=solver, **ANNEALING), 1e-11, this)


def peak_memory(this: Problem, solver: str, folder: Path) -> int:
    """Bytes allocated at the worst moment of a forward and backward, over what stood before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run(this, solver=solver, n_iters=4)
    recorded.export_chrome_trace(str(folder / "trace.json"))
    trace = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


@solvers
def test_memory_grows_with_the_length_and_not_with_its_square(
    solver: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T = S = 2048 in blocks of 16 queries: a quarter of one T × S tensor is never there at once."""
    monkeypatch.setattr("cda_cli.ops.attention_blocks.BLOCK_SCORES_CPU", 1)
    long, short = (problem((1, 1, T, T, 8), 2.0) for T in (2048, 1024))
    peak = peak_memory(long, solver, tmp_path)
    assert peak > 5 * long.query.nbytes, "the profiler saw nothing, so the bounds below say nothing"
    assert peak < 2048 * 2048 * 4 / 4
    assert peak < 2.2 * peak_memory(short, solver, tmp_path)


@solvers
def test_the_backward_keeps_the_inputs_and_a_few_numbers_per_query(solver: str) -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    T, D = 500, 4
    this = problem((1, 1, T, T, D), (1, 1, T))
    leaves = [tensor.requires_grad_() for tensor in this[:4]]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        soft_topk_attention(*leaves, solver=solver, n_iters=20)
    inputs = 3 * T * D + T
    assert inputs <= sum(kept.values()) <= inputs + 20 * T
