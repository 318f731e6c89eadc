"""Which backend runs, the published one behind our doors, what is refused, and what torch.compile sees."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch import Tensor

from cda_cli.ops import Backend, Choice, Solver, choose_backend, soft_topk, soft_topk_attention
from cda_cli.ops.attention_blocks import blockwise_attention, blockwise_attention_backward
from cda_cli.ops.backends import BACKENDS, triton_kernels
from cda_cli.ops.row_operator import soft_topk_rows, soft_topk_rows_backward
from cda_cli.ops.solve_spec import SolveSpec
from cda_cli.ops.solvers import CODE
from tests.ops.cases import DEVICE, assert_within, random_mask, random_rows

ITERATIVE = {"solver": "iterative", "n_iters": 7, "eps_init": 3.0, "eps_decay": 0.6, "eps": 0.2}


def rows_door(k: float | Tensor = 2.0, **settings: object) -> Tensor:
    return soft_topk(random_rows(3, 9), k, **settings)


def attention_door(k: float | Tensor = 2.0, **settings: object) -> Tensor:
    return soft_topk_attention(*attention_inputs(5, 5)[:3], k, **settings)


def attention_inputs(T: int, S: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value [2, 3, ·, 8] and a budget for each query."""
    budget = random_rows(2, 3, T, seed=4).abs() * 3 + 0.3
    return random_rows(2, 3, T, 8, seed=1), random_rows(2, 3, S, 8, seed=2), random_rows(2, 3, S, 8, seed=3), budget


def with_gradients(door: Callable[..., Tensor], *inputs: Tensor, **settings: object) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = door(*leaves, **settings)
    return [output.detach(), *torch.autograd.grad(output, leaves, random_rows(*output.shape, seed=9).to(output))]


doors = pytest.mark.parametrize("door", [rows_door, attention_door])


def test_every_name_of_a_backend_or_solver_has_its_object() -> None:
    """A name without one would pass the checks of the doors and then be a KeyError."""
    assert {name: backend.name for name, backend in BACKENDS.items()} == {name: name for name in BACKENDS}
    assert set(get_args(Backend)) == {"auto", *BACKENDS}
    assert set(get_args(Choice.__annotations__["name"])) <= set(BACKENDS)
    assert set(CODE["torch"]()) == set(get_args(Solver))
    assert set(CODE["triton"]()) <= set(get_args(Solver))


def test_settings_come_out_of_a_custom_operator_as_they_went_in() -> None:
    spec = SolveSpec("iterative", 0.2, 7, 3.0, 0.6)
    assert SolveSpec.of_flat(*spec.flat()) == spec


@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_compiled_rows_take_any_number_of_iterations_with_one_graph(solver: str) -> None:
    """The second number makes it a symbol. No further one is compiled."""
    torch._dynamo.reset()
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def function(scores: Tensor, n_iters: int) -> Tensor:
        return soft_topk(scores, 2.0, solver=solver, n_iters=n_iters)

    scores = random_rows(3, 9)
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for n_iters in (3, 4, 5, 6):
        assert torch.equal(compiled(scores, n_iters), function(scores, n_iters))
    assert graphs <= 2


@pytest.mark.parametrize("masked", [False, True])
def test_colt5_equals_the_iterative_torch_backend(masked: bool) -> None:
    """Values, ∂s and ∂k, through the same door with the same arguments."""
    scores, budget = random_rows(2, 5, 21), random_rows(2, 5, seed=1).abs() * 4 + 0.3
    mask = random_mask(2, 5, 21, seed=2, share=0.7) if masked else None
    assert mask is None or mask.any(-1).all()
    ours = with_gradients(soft_topk, scores, budget, mask=mask, backend="torch", **ITERATIVE)
    published = with_gradients(soft_topk, scores, budget, mask=mask, backend="colt5", **ITERATIVE)
    for name, actual, expected in zip(("λ", "∂L/∂s", "∂L/∂k"), ours, published, strict=True):
        assert_within(actual, expected, 1e-5 if name == "λ" else 2e-4, name)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "S"), [(9, 9), (6, 11)])
def test_colt5_attention_equals_the_iterative_torch_backend(T: int, S: int, causal: bool) -> None:
    inputs = attention_inputs(T, S)
    ours = with_gradients(soft_topk_attention, *inputs, causal=causal, backend="torch", **ITERATIVE)
    published = with_gradients(soft_topk_attention, *inputs, causal=causal, backend="colt5", **ITERATIVE)
    for name, actual, expected in zip(("output", "∂q", "∂k", "∂v", "∂budget"), ours, published, strict=True):
        assert_within(actual, expected, 1e-4 * expected.abs().max().item(), name)


def test_colt5_attention_knows_documents_and_shared_key_heads() -> None:
    """A number that comes back later in a sequence is another document."""
    query, key, value, budget = attention_inputs(5, 5)
    inputs = query, key[:, :1], value[:, :1], budget
    documents = torch.tensor([[0, 0, 1, 0, 0], [2, 2, 2, 2, 2]])
    ours = soft_topk_attention(*inputs, documents=documents, backend="torch", **ITERATIVE)
    published = soft_topk_attention(*inputs, documents=documents, backend="colt5", **ITERATIVE)
    assert_within(published, ours, 1e-4, "output")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_colt5_gives_the_dtype_of_the_scores(dtype: torch.dtype) -> None:
    scores = random_rows(3, 9).to(dtype)
    assert soft_topk(scores, 2.0, backend="colt5", solver="iterative").dtype == dtype


def test_minus_infinity_is_a_mask_for_colt5_too() -> None:
    """The door says so of every backend; the published code knows only its mask argument."""
    scores, mask = random_rows(4, 9), random_mask(4, 9, seed=1, share=0.7)
    masked = soft_topk(scores, 2.0, mask=mask, backend="colt5", **ITERATIVE)
    infinite = soft_topk(scores.masked_fill(~mask, -torch.inf), 2.0, backend="colt5", **ITERATIVE)
    assert_within(infinite, masked, 1e-6, "λ")


@doors
def test_the_exact_solver_refuses_colt5_and_names_the_remedy(door: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="choose solver 'iterative' or backend 'torch'"):
        door(backend="colt5", solver="exact")


@doors
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"backend": "cuda"}, "auto, torch, triton, colt5, not 'cuda'"),
        ({"solver": "newton"}, "exact, iterative, not 'newton'"),
        ({"eps": 0.0}, "eps must be greater than 0"),
        ({"eps": -1.0}, "eps must be greater than 0"),
        ({"eps": math.nan}, "eps must be greater than 0"),
        ({"eps_init": 0.0, "solver": "iterative"}, "eps_init must be greater than 0"),
        ({"n_iters": 0, "solver": "iterative"}, "n_iters"),
        ({"n_iters": -1, "solver": "iterative"}, "n_iters"),
        ({"n_iters": 0, "solver": "iterative", "backend": "colt5"}, "n_iters"),
        ({"k": 0.0}, "k must be greater than 0"),
        ({"k": -2}, "k must be greater than 0"),
        ({"k": math.nan}, "k must be greater than 0"),
    ],
)
def test_a_setting_without_meaning_is_refused(
    door: Callable[..., Tensor], setting: dict[str, object], message: str
) -> None:
    """As a ValueError that names the setting, not as NaN and not as an error from within."""
    with pytest.raises(ValueError, match=message):
        door(**setting)


def test_colt5_refuses_to_give_a_threshold() -> None:
    with pytest.raises(ValueError, match="choose backend 'torch'"):
        attention_door(backend="colt5", solver="iterative", return_threshold=True)


@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_auto_is_torch_on_a_cpu(solver: str) -> None:
    chosen = choose_backend("auto", solver, torch.device("cpu"))
    assert chosen.name == "torch"
    assert chosen.reason
    assert torch.equal(rows_door(backend="auto", solver=solver), rows_door(backend="torch", solver=solver))


def test_triton_refuses_what_it_cannot_run_and_names_the_remedy() -> None:
    """No quiet way round: float64 here, and a CPU without the interpreter in a process of its own."""
    with pytest.raises(ValueError, match="float64; choose backend 'torch'"):
        soft_topk(random_rows(3, 9).double(), 2.0, backend="triton")
    program = (
        "import torch; from cda_cli.ops import choose_backend as c; "
        "print(c('auto', 'exact', torch.device('cpu'))); c('triton', 'exact', torch.device('cpu'))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert "name='torch'" in done.stdout
    assert "ValueError: backend 'triton' cannot run: its kernels are for a GPU" in done.stderr
    assert "choose backend 'torch'" in done.stderr


@pytest.mark.parametrize(
    ("module", "obstacle"),
    [
        (None, "the package triton is not installed"),
        (SimpleNamespace(__version__="3.5.1"), "the kernels need triton 3.6 or later, and this is 3.5.1"),
    ],
)
def test_a_machine_without_a_triton_that_will_do(
    module: object, obstacle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", module)
    triton_kernels._find_triton_obstacle.cache_clear()
    try:
        with pytest.raises(ValueError, match=f"cannot run: {obstacle}; choose backend 'torch'"):
            rows_door(backend="triton")
    finally:
        triton_kernels._find_triton_obstacle.cache_clear()


def test_heads_that_the_kernels_cannot_hold_are_left_to_torch() -> None:
    """A forced backend says so; the iterative solver has no such limit, since its kernels are those of rows."""
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="up to 256 channels, not 257; choose backend 'torch'"):
        choose_backend("triton", "exact", cpu, head_width=257)
    wide = torch.zeros(1, 1, 2, 257)
    with pytest.raises(ValueError, match="up to 256 channels"):
        soft_topk_attention(wide, wide, wide, 2.0, backend="triton")


def test_the_kernels_refuse_a_mixture_of_dtypes() -> None:
    query, key, value, _ = (tensor.to(DEVICE) for tensor in attention_inputs(5, 5))
    with pytest.raises(ValueError, match="of one dtype"):
        soft_topk_attention(query, key.bfloat16(), value, 2.0, backend="triton")


def test_a_value_of_another_width_is_refused() -> None:
    query, key, value, _ = attention_inputs(5, 5)
    with pytest.raises(ValueError, match="do not fit"):
        soft_topk_attention(query, key, value[..., :4], 2.0)


def test_float64_is_never_computed_in_float32() -> None:
    """Left to itself, a machine with kernels still takes the torch backend for float64."""
    chosen = choose_backend("auto", "exact", torch.device(DEVICE), torch.float64)
    assert chosen.name == "torch"


@pytest.mark.parametrize("solver", ["exact", "iterative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_changes_nothing_of_rows(solver: str, dtype: torch.dtype) -> None:
    """Values and gradients bit for bit; of attention tests/ops/test_transforms.py tells."""
    inputs = random_rows(4, 9).to(dtype), torch.full((4,), 2.5, dtype=dtype)
    expected = with_gradients(soft_topk, *inputs, solver=solver)
    with torch.autocast("cpu", torch.bfloat16):
        actual = with_gradients(soft_topk, *inputs, solver=solver)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def row_samples(solver: str, dtype: torch.dtype) -> tuple[object, ...]:
    budget = torch.full((4,), 2.5, requires_grad=True)
    return random_rows(4, 9).to(dtype).requires_grad_(), budget, solver, 5, [0.1, 4.0, 0.7], "torch"


def attention_samples(solver: str, dtype: torch.dtype, sequences: int = 2) -> tuple[object, ...]:
    query, key, value, budget = (tensor[:sequences] for tensor in attention_inputs(5, 7))
    # As a model makes its heads: views of [B, T, H, D], and of [B, T, H].
    tensors = [query.to(dtype), key.to(dtype), value.to(dtype), budget]
    views = [tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in tensors]
    return *views, None, 0.3, True, solver, 5, [0.1, 4.0, 0.7], "torch"


@pytest.mark.parametrize("solver", ["exact", "iterative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_registered_operators_keep_the_rules_of_torch(solver: str, dtype: torch.dtype) -> None:
    """Schema, fake shapes and strides, autograd registration, traced gradients."""
    torch.library.opcheck(soft_topk_rows, row_samples(solver, dtype))
    torch.library.opcheck(blockwise_attention, attention_samples(solver, dtype))


@pytest.mark.parametrize("solver", ["exact", "iterative"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_the_registered_backwards_keep_the_rules_of_torch(solver: str, sequences: int) -> None:
    """They are not differentiable, so without the gradient checks. Heads of one sequence stay views where its batch and
    heads become one dimension."""
    checks = ("test_schema", "test_faketensor")
    with torch.no_grad():
        scores, budget, *settings = row_samples(solver, torch.float32)
        weights, saved = soft_topk_rows(scores, budget, *settings)
        torch.library.opcheck(soft_topk_rows_backward, (weights, scores, budget, saved, *settings), test_utils=checks)
        query, key, value, budget, documents, *settings = attention_samples(solver, torch.float32, sequences)
        output, _, saved = blockwise_attention(query, key, value, budget, documents, *settings)
        arguments = (output, query, key, value, budget, documents, saved, *settings)
        torch.library.opcheck(blockwise_attention_backward, arguments, test_utils=checks)


@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_compiled_rows_equal_eager_ones(solver: str) -> None:
    """One graph without a break, with the same values and gradients."""

    def function(scores: Tensor, budget: Tensor) -> Tensor:
        mask = torch.ones(9, 9, dtype=torch.bool).tril()
        return 2 * soft_topk(scores * 3, budget + 0.5, eps=0.3, mask=mask, solver=solver, n_iters=4)

    inputs = random_rows(2, 9, 9), torch.full((2, 9), 2.0)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(with_gradients(compiled, *inputs), with_gradients(function, *inputs), strict=True):
        assert_within(ours, theirs, 1e-6, "compiled")


@pytest.mark.parametrize("solver", ["exact", "iterative"])
def test_compiled_attention_equals_eager_attention(solver: str) -> None:
    """One graph without a break, also from inputs that are views, as a model makes its heads."""

    def function(query: Tensor, key: Tensor, value: Tensor, budget: Tensor) -> Tensor:
        heads = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        return soft_topk_attention(*heads, budget, eps=0.3, solver=solver, n_iters=4).transpose(1, 2) + 1

    query, key, value, budget = attention_inputs(6, 8)
    inputs = [tensor.transpose(1, 2).contiguous() for tensor in (query, key, value)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = with_gradients(function, *inputs, budget)
    for ours, theirs in zip(with_gradients(compiled, *inputs, budget), eager, strict=True):
        assert_within(ours, theirs, 1e-6, "compiled")
