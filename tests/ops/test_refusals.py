"""What the doors refuse, in one sentence, and what a budget does that cannot be refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cda_cli.ops import soft_topk, soft_topk_attention
from cda_cli.ops.attention_blocks import blockwise_attention
from cda_cli.ops.row_operator import soft_topk_rows
from cda_cli.ops.triton.fused_attention import fused_attention
from tests.ops.cases import DEVICE, assert_within, random_rows

NAMES = {"query": "query_BHTD", "key": "key_BHSD", "value": "value_BHSD"}
HEADS = {"query": (2, 4, 5, 8), "key": (2, 2, 5, 8), "value": (2, 2, 5, 8)}
# Budgets without meaning between two that have one; the weights of their rows are NaN where nobody may look at k.
BUDGETS = (2.0, -2.0, 0.0, -math.inf, math.nan, 1.5)
BROKEN = torch.tensor([False, True, True, True, True, False])
solvers = pytest.mark.parametrize("solver", ["exact", "iterative"])


def arguments(door: Callable[..., Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """Of the door that `rows` or `attention` stands for."""
    if door is rows:
        return {"scores": random_rows(3, 9).to(device)}
    return {NAMES[name]: random_rows(*shape).to(device) for name, shape in HEADS.items()}


def rows(**changed: Any) -> Tensor:
    return soft_topk(**({"sparsity_k": 2.0} | arguments(rows) | changed))


def attention(**changed: Any) -> Tensor:
    changed = {NAMES.get(name, name): value for name, value in changed.items()}
    return soft_topk_attention(**({"sparsity_k": 2.0} | arguments(attention) | changed))


doors = pytest.mark.parametrize("door", [rows, attention])


def assert_refused(door: Callable[..., Tensor], kind: type[Exception], message: str, **changed: Any) -> None:
    with pytest.raises(kind, match=message) as raised:
        door(**changed)
    assert "\n" not in str(raised.value)


@doors
@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"eps": math.inf}, ValueError, "eps must be finite"),
        ({"eps": torch.tensor(0.1)}, TypeError, "eps must be a number, not a tensor"),
        ({"eps": "0.1"}, TypeError, "eps must be a number"),
        ({"eps": True}, TypeError, "eps must be a number"),
        ({"eps_init": math.nan}, ValueError, "eps_init must be greater than 0"),
        ({"eps_init": math.inf}, ValueError, "eps_init must be finite"),
        ({"eps_decay": 0.0}, ValueError, "eps_decay must be greater than 0"),
        ({"eps_decay": -0.5}, ValueError, "eps_decay must be greater than 0"),
        ({"eps_decay": 1.5}, ValueError, "eps_decay must be at most 1"),
        ({"eps_decay": math.nan}, ValueError, "eps_decay must be greater than 0"),
        ({"n_iters": 2.5}, TypeError, "n_iters must be a whole number"),
        ({"n_iters": True}, TypeError, "n_iters must be a whole number"),
        ({"sparsity_k": -math.inf}, ValueError, "sparsity_k must be greater than 0"),
        ({"sparsity_k": "2"}, TypeError, "sparsity_k must be a number"),
        ({"sparsity_k": True}, TypeError, "sparsity_k must be a number"),
        ({"sparsity_k": 2j}, TypeError, "sparsity_k must be a number"),
        ({"sparsity_k": None}, TypeError, "sparsity_k must be a number"),
        ({"sparsity_k": torch.tensor(True)}, TypeError, "sparsity_k must hold numbers"),
        ({"sparsity_k": torch.tensor(2j)}, TypeError, "sparsity_k must hold numbers"),
        ({"sparsity_k": torch.tensor(-2.0)}, ValueError, "greater than 0 in every row, not -2.0"),
        ({"sparsity_k": torch.tensor(0)}, ValueError, "greater than 0 in every row, not 0"),
        ({"sparsity_k": torch.full((7,), 2.0)}, ValueError, r"sparsity_k \(7,\) does not broadcast"),
        ({"sparsity_k": torch.full((1, 1, 1, 1, 1), 2.0)}, ValueError, "does not broadcast"),
    ],
)
@solvers
def test_settings_and_budgets_without_meaning(
    door: Callable[..., Tensor], changed: dict[str, Any], kind: type[Exception], message: str, solver: str
) -> None:
    """By either solver, whether or not it reads the setting."""
    assert_refused(door, kind, message, solver=solver, **changed)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_scores_that_are_no_real_numbers(dtype: torch.dtype) -> None:
    """Weights of an integer dtype would be 0 and 1."""
    assert_refused(rows, TypeError, f"scores must be float32, .*, not {dtype}", scores=torch.ones(3, 9).to(dtype))
    for name, shape in HEADS.items():
        assert_refused(attention, TypeError, f"{name} must be .*, not {dtype}", **{name: torch.ones(shape).to(dtype)})


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"scores": torch.tensor(1.0)}, ValueError, "scores must have a dimension"),
        ({"scores": [1.0, 2.0]}, TypeError, "scores must be a tensor, not list"),
        ({"mask": torch.ones(3, 9)}, TypeError, "mask must be a tensor of bool, .*, not a tensor of torch.float32"),
        ({"mask": torch.ones(3, 9, dtype=torch.int64)}, TypeError, "mask must be a tensor of bool"),
        ({"mask": True}, TypeError, "mask must be a tensor of bool"),
        ({"mask": torch.ones(9, 3, dtype=torch.bool)}, ValueError, r"mask \(9, 3\) does not broadcast"),
        ({"mask": torch.ones(2, 3, 9, dtype=torch.bool)}, ValueError, "does not broadcast"),
        ({"scores": torch.zeros(3, 1), "mask": torch.ones(3, 9).bool()}, ValueError, "does not broadcast"),
        ({"mask": torch.ones(3, 9, device="meta").bool()}, ValueError, "mask is on meta and must be on cpu"),
        ({"sparsity_k": torch.full((3, 9), 2.0)}, ValueError, "does not broadcast"),
    ],
)
def test_rows_without_meaning(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    assert_refused(rows, kind, message, **changed)


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"scale": math.nan}, ValueError, "scale must be finite"),
        ({"scale": -math.inf}, ValueError, "scale must be finite"),
        ({"scale": torch.tensor(0.1)}, TypeError, "scale must be a number"),
        ({"largest_k": 0.0}, ValueError, "largest_k must be greater than 0"),
        ({"largest_k": math.nan}, ValueError, "largest_k must be greater than 0"),
        ({"largest_k": torch.tensor(2.0)}, TypeError, "largest_k must be a number"),
        ({"query": torch.zeros(4, 5, 8)}, ValueError, r"query must have the four dimensions .*, not \(4, 5, 8\)"),
        ({"key": torch.zeros(2, 5, 8)}, ValueError, "key must have the four dimensions"),
        ({"value": torch.zeros(1, 2, 2, 5, 8)}, ValueError, "value must have the four dimensions"),
        ({"query": None}, TypeError, "query must be a tensor, not NoneType"),
        ({name: torch.zeros(*shape[:3], 0) for name, shape in HEADS.items()}, ValueError, "D at least 1"),
        ({"key": torch.zeros(HEADS["key"], device="meta")}, ValueError, "key is on meta and must be on cpu"),
        ({"documents": torch.zeros(2, 5)}, TypeError, "documents must be a tensor of whole numbers"),
        ({"documents": torch.zeros(2, 5, dtype=torch.bool)}, TypeError, "documents must be a tensor of whole numbers"),
        ({"documents": [0, 0, 1]}, TypeError, "documents must be a tensor of whole numbers"),
        ({"documents": torch.zeros(2, 5, device="meta").long()}, ValueError, "documents is on meta"),
        ({"sparsity_k": torch.full((2, 4, 5, 1), 2.0)}, ValueError, "does not broadcast"),
    ],
)
def test_attention_without_meaning(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    assert_refused(attention, kind, message, **changed)


@doors
@solvers
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_infinite_budget_is_one_that_covers_every_row(
    door: Callable[..., Tensor], solver: str, backend: str
) -> None:
    """As a number and in a tensor, and with a gradient."""
    expected = door(sparsity_k=1e9, solver=solver, backend="torch")
    forms = [math.inf, torch.tensor(math.inf, device=DEVICE)]
    if backend == "torch":
        forms += [10**400, np.float32(math.inf), torch.tensor([math.inf])]
    for k in forms:
        assert_within(on_device(door, sparsity_k=k, solver=solver, backend=backend), expected, 1e-5, f"k = {k!r}")


def on_device(door: Callable[..., Tensor], **settings: Any) -> Tensor:
    """What `door` gives for inputs on the device that the kernels run on; its gradient is finite."""
    inputs = arguments(door, DEVICE)
    leaf = next(iter(inputs.values())).requires_grad_()
    output = door(**inputs, **settings)
    assert torch.autograd.grad(output.sum(), leaf)[0].isfinite().all()
    return output.detach().cpu()


@solvers
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_of_a_budget_without_meaning_are_nan(backend: str, solver: str) -> None:
    """The rule where no one may look at k, as on a GPU: the operator itself, below the door. The other rows are right.

    Also where a row has one visible entry. What is masked is 0 or NaN.
    """
    scores, budget = random_rows(6, 8).to(DEVICE), torch.tensor(BUDGETS, device=DEVICE)
    scores[1, 1:] = -torch.inf
    weights, _ = soft_topk_rows(scores, budget, solver, 5, [0.1, 4.0, 0.7], backend)
    visible = scores > -torch.inf
    assert weights[BROKEN][visible[BROKEN]].isnan().all()
    assert not weights[~visible].nan_to_num().any()
    expected = soft_topk(scores[~BROKEN], budget[~BROKEN], solver=solver, backend="torch", n_iters=5)
    assert_within(weights[~BROKEN].cpu(), expected.cpu(), 1e-5, "λ")


@pytest.mark.parametrize("at_most_two", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("T", [1, 6])
def test_the_kernels_of_attention_make_such_a_query_nan(T: int, trained: bool, at_most_two: bool) -> None:
    """All of them: for k ≤ 2, for any k, and for a few queries; below the door, as on a GPU."""
    query, key, value = (random_rows(1, 6, length, 8, seed=length).to(DEVICE) for length in (T, 9, 9))
    budget = torch.tensor(BUDGETS, device=DEVICE)[:, None].expand(1, 6, T).contiguous()
    output, *_ = fused_attention(query, key, value, budget, None, 0.1, 0.3, True, at_most_two, trained)
    assert output[:, BROKEN].isnan().all()
    sound = soft_topk_attention(
        *(x[:, ~BROKEN] for x in (query, key, value)), budget[:, ~BROKEN], scale=0.3, backend="torch"
    )
    assert_within(output[:, ~BROKEN].cpu(), sound.cpu(), 1e-5, "output")


@pytest.mark.parametrize(("solver", "backend"), [("exact", "torch"), ("iterative", "torch"), ("iterative", "triton")])
def test_attention_by_blocks_makes_such_a_query_nan(solver: str, backend: str) -> None:
    query, key, value = (random_rows(1, 6, 5, 8, seed=seed).to(DEVICE) for seed in range(3))
    budget = torch.tensor(BUDGETS, device=DEVICE)[:, None].expand(1, 6, 5).contiguous()
    output, *_ = blockwise_attention(
        query, key, value, budget, None, 0.3, True, solver, 5, [0.1, 4.0, 0.7], backend
    )  # fmt: skip
    assert output[:, BROKEN].isnan().all()
    assert output[:, ~BROKEN].isfinite().all()


@doors
@solvers
def test_compiled_code_and_transforms_make_such_a_row_nan(door: Callable[..., Tensor], solver: str) -> None:
    """They cannot look at k: no graph break, no weight outside [0, 1]."""
    k, inputs = torch.tensor(-2.0), arguments(door)

    def called(k: Tensor) -> Tensor:
        return (soft_topk if door is rows else soft_topk_attention)(**inputs, sparsity_k=k, solver=solver)

    assert torch.compile(called, fullgraph=True, backend="aot_eager")(k).isnan().all()
    assert torch.func.vmap(called)(k[None]).isnan().all()


@doors
@solvers
def test_a_budget_of_nan_in_a_tensor_shows_in_its_row(door: Callable[..., Tensor], solver: str) -> None:
    """As it comes out of a model whose weights are NaN: the loss shows it, and the run goes on."""
    assert door(sparsity_k=torch.tensor(math.nan), solver=solver).isnan().all()
