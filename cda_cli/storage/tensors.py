"""Flat dicts of tensors as safetensors files, bit for bit."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cda_cli.errors import CheckpointError, StorageError
from cda_cli.storage.manifest import damaged, verify_file

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


class ShardFile:
    """A file of tensors in a checkpoint. If it has a `sha256` to check, that is done before a tensor is read."""

    def __init__(self, path: Path, sha256: str | None) -> None:
        from safetensors import SafetensorError, safe_open

        self._path, self._unchecked = path, sha256
        try:
            opened: Any = safe_open(path, "pt")
            self._file, self.names = opened, list(opened.keys())
        except (SafetensorError, *_MALFORMED) as error:
            raise self._malformed(error) from error

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """What the header of the file says of a tensor."""
        from safetensors import SafetensorError

        try:
            stored = self._file.get_slice(name)
            shape = tuple(stored.get_shape())
            return shape, (stored[0:0] if shape else self._file.get_tensor(name)).dtype
        except (SafetensorError, *_MALFORMED) as error:
            raise self._malformed(error) from error

    def read(self, name: str, rows: slice, into: Tensor) -> None:
        """Copies `rows` of a tensor, or all of one without dimensions, into `into`, which has their shape."""
        from safetensors import SafetensorError

        if self._unchecked is not None:
            verify_file(self._path, self._unchecked)
            self._unchecked = None
        try:
            # The file is mapped, so only these rows are read.
            into.copy_(self._file.get_slice(name)[rows] if into.ndim else self._file.get_tensor(name))
        except (SafetensorError, *_MALFORMED) as error:
            raise self._malformed(error) from error

    def _malformed(self, error: Exception) -> CheckpointError:
        return damaged(self._path, f"cannot be read as safetensors ({type(error).__name__})")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint, of which nothing is read yet. Its rows lie in `pieces`, one after another."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[tuple[ShardFile, int], ...]  # each with its number of rows

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The rows from `start` to `stop`, or all of the tensor, in memory of their own on the CPU.

        Raises CheckpointError if a file with some of them is damaged.
        """
        import torch

        if not self.shape:
            whole = torch.empty((), dtype=self.dtype)
            self.pieces[0][0].read(self.name, slice(None), whole)
            return whole
        stop = self.shape[0] if stop is None else stop
        read = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        first = 0  # the row of the whole tensor with which the piece begins
        for file, rows in self.pieces:
            low, high = max(start, first), min(stop, first + rows)
            if low < high:
                file.read(self.name, slice(low - first, high - first), read[low - start : high - start])
            first += rows
        return read


def open_tensors(paths: Sequence[Path], unchecked: Mapping[str, str] | None = None) -> dict[str, StoredTensor]:
    """Opens the tensors of one file, or of the shards that stand for it.

    `unchecked` has the SHA-256 of each file that is not verified yet, by its name. Raises CheckpointError if a file is
    malformed, or if the shards do not fit together.
    """
    found: dict[str, StoredTensor] = {}
    for path in paths:
        file = ShardFile(path, (unchecked or {}).get(path.name))
        for name in file.names:
            shape, dtype = file.shape_and_dtype(name)
            piece = (file, shape[0] if shape else 1)
            before = found.setdefault(name, StoredTensor(name, (0, *shape[1:]) if shape else (), dtype, ()))
            if bool(shape) != bool(before.shape) or before.shape[1:] != shape[1:] or before.dtype != dtype:
                raise damaged(path, f"has other rows of {name} than the shards before")
            if not shape and before.pieces:
                raise damaged(path, f"has {name} once more")
            whole = (before.shape[0] + shape[0], *shape[1:]) if shape else ()
            found[name] = StoredTensor(name, whole, dtype, (*before.pieces, piece))
    return found


def check_fits(
    tensors: Mapping[str, Tensor | StoredTensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
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
