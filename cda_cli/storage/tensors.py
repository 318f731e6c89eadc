"""Flat dicts of tensors as safetensors files, bit for bit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cda_cli.errors import CheckpointError, StorageError
from cda_cli.storage.manifest import damaged

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Besides safetensors' own error, the library and torch raise these for malformed files.
_MALFORMED = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors` of any device, shape (zero-size and 0-d too) and layout. Tensors that share memory are copied.

    `metadata` are words that the file has besides them.

    Raises OSError as every other write does, and ValueError for a name that the format keeps for itself.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if "__metadata__" in tensors:
        raise ValueError("a tensor cannot be called __metadata__: the file could not be read again")
    try:
        save_file(_separate(tensors), path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise StorageError(f"could not write {path}: {error}; check the disk and run again") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a verified file, in memory of their own on the CPU. Raises CheckpointError if malformed."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # The loader maps the file: without the copy, a file cut short later would kill the process (SIGBUS).
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, *_MALFORMED) as error:
        raise damaged(path, f"cannot be read as safetensors ({type(error).__name__})") from error


def check_fits(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Compares names, shapes and dtypes with what the configuration asks for.

    Raises a CheckpointError that names the first difference.
    """
    for name, (shape, dtype) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise _misfit(f"it has no {name}")
        if tuple(tensor.shape) != tuple(shape):
            raise _misfit(f"{name} has shape {tuple(tensor.shape)} in it and {tuple(shape)} in the configuration")
        if tensor.dtype != dtype:
            raise _misfit(f"{name} is {_word(tensor.dtype)} in it and {_word(dtype)} in the configuration")
    for name in tensors:
        if name not in expected:
            raise _misfit(f"it has {name}, which the configuration does not know")


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    separate: dict[str, Tensor] = {}
    addresses: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        address = plain.untyped_storage().data_ptr()
        # Address 0 is the empty storage, which no tensor owns. The dict keeps the memory at every other address alive.
        separate[name] = plain.clone() if address and address in addresses else plain
        addresses.add(address)
    return separate


def _misfit(difference: str) -> CheckpointError:
    return CheckpointError(
        f"the configuration does not fit the checkpoint: {difference}; use the configuration it was trained with"
    )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
