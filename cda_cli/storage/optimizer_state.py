"""An optimizer's nested state dict as flat tensors and a JSON-able rest, and back without loss.

Tensors go out under their place, such as `state.0.exp_avg`, and leave `{"$tensor": NAME}` behind. JSON has neither
tuples nor keys other than strings, so `{"$tuple": [...]}` and `{"$items": [[key, value], ...]}` stand for those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cda_cli.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def pack_optimizer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Splits `optimizer.state_dict()` into the tensors (for `publish(optimizer=…)`) and the plain rest.

    The rest belongs into `state["optimizer"]`. Raises TypeError for a value that is no tensor, number, string,
    None, list, tuple or dict of such, and ValueError if two tensors would get one name.
    """
    tensors: dict[str, Tensor] = {}
    packed = {key: _pack(value, key, tensors) for key, value in state_dict.items()}
    return tensors, packed


def unpack_optimizer(tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict that `pack_optimizer` took apart. Raises CheckpointError if the two halves do not fit."""
    unused = dict(tensors)
    try:
        state_dict = {key: _unpack(value, unused) for key, value in plain.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise _unfit(f"its state.json does not describe them ({error})") from error
    for name in unused:
        raise _unfit(f"its state.json does not know {name}")
    return state_dict


def _pack(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    from torch import Tensor

    if isinstance(value, Tensor):
        if place in tensors:
            raise ValueError(f"two tensors of the optimizer would be called {place}")
        tensors[place] = value
        return {"$tensor": place}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _pack(inner, f"{place}.{key}", tensors) for key, inner in value.items()}
        return {"$items": [[_pack(k, place, tensors), _pack(v, f"{place}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(inner, f"{place}.{index}", tensors) for index, inner in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{place} of the optimizer is a {type(value).__name__}, which a checkpoint cannot hold")


def _unpack(value: Any, unused: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(inner, unused) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$tensor"}:
        return unused.pop(value["$tensor"])
    if value.keys() == {"$tuple"}:
        return tuple(_unpack(inner, unused) for inner in value["$tuple"])
    if value.keys() == {"$items"}:
        return {_unpack(key, unused): _unpack(inner, unused) for key, inner in value["$items"]}
    return {key: _unpack(inner, unused) for key, inner in value.items()}


def _unfit(fault: str) -> CheckpointError:
    return CheckpointError(f"the optimizer's tensors do not fit the checkpoint: {fault}; use an earlier checkpoint")
