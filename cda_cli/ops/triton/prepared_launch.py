"""The last step of a launch, with all prepared that stays the same from call to call.

Triton goes through all arguments in Python to find the descriptors among them, which takes the host longer than the
rest of a launch, and asks the driver about the pointer of each tensor. It has no public way around. What this file
knows of Triton's launcher holds for 3.6 and 3.7; where the launcher looks different, the launch is Triton's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

# What stays the same of a described tensor: what follows its pointer where its map is filled, and its sizes.
Described = tuple[tuple[Any, ...], tuple[int, ...]]
LaunchOnStream = Callable[[int, tuple[Any, ...]], None]


def prepare(
    compiled: Any, grid: tuple[int, int, int], first: tuple[Any, ...], rest: tuple[Any, ...]
) -> LaunchOnStream | None:
    """A function that launches a compiled kernel on a stream with its varying arguments, before `rest`, or None.

    `first` are the varying arguments of one launch. Those of the others have tensors and numbers at the same places.
    Where `first` has a descriptor they have the tensor itself, with the same shape and strides.
    """
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    places = [
        place for place, argument in enumerate(first) if isinstance(argument, (TensorDescriptor, GluonDescriptor))
    ]
    if not places:
        return lambda stream, varying: run(*grid, stream, function, metadata, None, None, None, *varying, *rest)
    known = inspect.getclosurevars(run.launch).nonlocals if inspect.isfunction(run.launch) else {}
    if not known.keys() >= {"launcher", "tensordesc_indices", "tensordesc_meta"}:
        return None
    if run.global_scratch_size or run.profile_scratch_size or None in known["tensordesc_meta"]:
        return None
    if sorted(known["tensordesc_indices"]) != places:
        return None
    described = dict(zip(places, known["tensordesc_meta"], strict=True))
    ways = tuple(
        _described(argument, described[place]) if place in described else isinstance(argument, Tensor)
        for place, argument in enumerate(first)
    )
    return _direct(run, known["launcher"], (function, metadata), grid, ways, rest)


def _described(descriptor: TensorDescriptor | GluonDescriptor, meta: dict[str, Any]) -> Described:
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    assert not meta["fp4_padded"]
    assert descriptor.padding == "zero"
    kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    shape, strides = descriptor.shape, descriptor.strides
    # After the pointer: what the map of a descriptor holds. 0 says that what lies outside reads as zeros.
    return (meta["swizzle"], meta["elem_size"], kind, meta["block_size"], shape, strides, 0), (*shape, *strides)


def _direct(
    run: Any,
    launcher: Callable[..., None],
    kernel: tuple[Any, Any],
    grid: tuple[int, int, int],
    ways: tuple[Described | bool, ...],
    rest: tuple[Any, ...],
) -> LaunchOnStream:
    """`ways` has what is known of each varying argument that is described; of the others, whether it is a tensor."""
    utils = triton.runtime.driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # 3.7, 3.6
    function, metadata = kernel
    flags = run.launch_cooperative_grid, run.launch_pdl

    def expanded(varying: tuple[Any, ...]) -> list[Any]:
        arguments: list[Any] = []
        for argument, way in zip(varying, ways):  # noqa: B905 - a check of each call
            if way is True:
                arguments.append(argument.data_ptr())  # Of a tensor the launcher would ask the driver.
            elif way is False:
                arguments.append(argument)
            else:
                arguments.append(fill(argument.data_ptr(), *way[0]))
                arguments += way[1]
        arguments += rest
        return arguments

    behind: tuple[Any, ...]
    if hasattr(run, "kernel_signature"):  # 3.7
        behind = (*flags, metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature)
        return lambda stream, varying: launcher(*grid, stream, function, *behind, expanded(varying))
    behind = (*flags, None, None, metadata, None, None, None)
    return lambda stream, varying: launcher(*grid, stream, function, *behind, *expanded(varying))
