"""The last step of a launch, with all prepared that stays the same from call to call.

Triton goes through all arguments in Python to find the descriptors among them, which takes the host longer than the
rest of a launch. It has no public way around. What this file knows of Triton's launcher holds for 3.6 and 3.7; where
the launcher looks different, the launch is Triton's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton

LaunchOnStream = Callable[[int, tuple[Any, ...]], None]


def prepare(compiled: Any, grid: tuple[int, int, int], rest: tuple[Any, ...]) -> LaunchOnStream:
    """A function that launches a compiled kernel on a stream with its first arguments, before `rest`."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def launch(stream: int, varying: tuple[Any, ...]) -> None:
        run(*grid, stream, function, metadata, None, None, None, *varying, *rest)

    known = inspect.getclosurevars(run.launch).nonlocals if inspect.isfunction(run.launch) else {}
    if not known.keys() >= {"launcher", "tensordesc_indices", "tensordesc_meta"}:
        return launch  # There are no descriptors, or another version of Triton finds them elsewhere.
    if run.global_scratch_size or run.profile_scratch_size or None in known["tensordesc_meta"]:
        return launch
    places = sorted(known["tensordesc_indices"])
    described = dict(zip(places, map(_described, known["tensordesc_meta"]), strict=True))
    ways = tuple(described.get(place) for place in range(max(places) + 1))
    return _direct(run, known["launcher"], (function, metadata), grid, ways, rest)


def _described(meta: dict[str, Any]) -> tuple[Any, ...]:
    """What the map of a descriptor holds besides pointer, shape and strides."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    assert not meta["fp4_padded"]
    return meta["swizzle"], meta["elem_size"], TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], meta["block_size"]


def _direct(
    run: Any,
    launcher: Callable[..., None],
    kernel: tuple[Any, Any],
    grid: tuple[int, int, int],
    ways: tuple[tuple[Any, ...] | None, ...],
    rest: tuple[Any, ...],
) -> LaunchOnStream:
    """`ways` says of each of the first arguments whether it is a descriptor, and of which kind."""
    utils = triton.runtime.driver.active.utils
    fill = getattr(utils, "fill_tma_descriptor_tiled", None) or utils.fill_tma_descriptor  # 3.7, 3.6
    function, metadata = kernel
    flags = run.launch_cooperative_grid, run.launch_pdl
    many = len(ways)

    def expanded(varying: tuple[Any, ...]) -> list[Any]:
        arguments: list[Any] = []
        for argument, way in zip(varying, ways):  # noqa: B905 - the others are no descriptors
            if way is None:
                arguments.append(argument)
            else:
                shape, strides = argument.shape, argument.strides
                arguments += fill(argument.base.data_ptr(), *way, shape, strides, 0), *shape, *strides
        arguments += varying[many:]
        arguments += rest
        return arguments

    behind: tuple[Any, ...]
    if hasattr(run, "kernel_signature"):  # 3.7
        behind = (*flags, metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature)
        return lambda stream, varying: launcher(*grid, stream, function, *behind, expanded(varying))
    behind = (*flags, None, None, metadata, None, None, None)
    return lambda stream, varying: launcher(*grid, stream, function, *behind, *expanded(varying))
