import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cda_cli.errors import CheckpointError
from cda_cli.storage.checkpoint import pack_optimizer, unpack_optimizer


def identical(left: object, right: object) -> bool:
    """Equal in type and in every bit, through any nesting."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        same_kind = left.shape == right.shape and left.dtype == right.dtype
        return same_kind and left.numpy().tobytes() == right.numpy().tobytes()
    if isinstance(left, dict):
        same_keys = [(type(k), k) for k in left] == [(type(k), k) for k in right]
        return same_keys and all(identical(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(identical, left, right))
    if isinstance(left, float):
        return struct.pack("<d", left) == struct.pack("<d", right)
    return left == right


_plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_tensors = st.sampled_from(
    [
        torch.tensor(3.5),
        torch.zeros(2, 0, 3),
        torch.tensor([float("nan"), -0.0]),
        torch.tensor([[True]]),
        torch.arange(5),
    ]
)
_keys = st.integers() | st.text(st.characters(codec="utf-8", exclude_characters="."), max_size=4)
_nested = st.recursive(
    _plain | _tensors,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(_keys, inner),
    max_leaves=12,
)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(["state", "param_groups", "more"]), _nested))
def test_any_state_comes_back_bit_for_bit(state_dict: dict[str, object]) -> None:
    try:
        tensors, plain = pack_optimizer(state_dict)
    except ValueError as error:
        # Keys 1 and "1" side by side would give two tensors one name: refused rather than mixed up.
        assert "two tensors" in str(error)  # noqa: PT017
        return
    back = unpack_optimizer(tensors, json.loads(json.dumps(plain, allow_nan=False)))
    assert identical(back, state_dict)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.LBFGS])
def test_real_optimizers_come_back(kind: type[torch.optim.Optimizer]) -> None:
    weights = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
    optimizer = kind(weights, lr=0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum((weight**2).sum() for weight in weights)
        loss.backward()
        return loss

    optimizer.step(closure)
    before = optimizer.state_dict()
    tensors, plain = pack_optimizer(before)
    assert tensors, f"{kind.__name__} has no tensor in its state after a step"
    back = unpack_optimizer(tensors, json.loads(json.dumps(plain, allow_nan=False)))
    assert identical(back, before)
    optimizer.load_state_dict(back)


def test_tensors_are_named_after_their_place() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    tensors, _ = pack_optimizer(optimizer.state_dict())
    assert set(tensors) == {"state.0.step", "state.0.exp_avg", "state.0.exp_avg_sq"}


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match=r"state\.0\.hook of the optimizer is a builtin_function"):
        pack_optimizer({"state": {0: {"hook": print}}})


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"state": {"$tensor": "b"}},
        {"state": {"$tensor": ["a"]}},
        {"state": [{"$tensor": "a"}, {"$tensor": "a"}]},
        {"state": {"$items": [1, 2]}, "more": {"$tensor": "a"}},
        {"state": {"$items": [[[], 2]]}, "more": {"$tensor": "a"}},
        {"state": {"$tuple": 3}, "more": {"$tensor": "a"}},
    ],
)
def test_halves_that_do_not_fit_are_refused(plain: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="tensors do not fit the checkpoint"):
        unpack_optimizer({"a": torch.ones(1)}, plain)
