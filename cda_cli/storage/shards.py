"""A checkpoint that several processes write together: each writes its rows of every tensor into files of its own.

    model-00001-of-00004.safetensors … model-00004-of-00004.safetensors

The rows of a tensor, in the order of the shards, make the tensor. A tensor without dimensions is in the first shard
alone. Nothing else says how many rows each shard has, so any number of processes can read them. A process cuts a
tensor as FSDP2 does, by `torch.chunk`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cda_cli.storage.atomic import explained, sync
from cda_cli.storage.manifest import Content, content_of, shard_name
from cda_cli.storage.tensors import write_tensors

if TYPE_CHECKING:
    from torch import Tensor


class Group(Protocol):
    """The `count` processes that save a checkpoint together, as process `rank` sees them."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    def broadcast(self, value: Any) -> Any:
        """Returns the first process's `value` in all. It waits for the first process."""

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes. It waits for all."""


class Alone:
    """The group of a single process."""

    rank, count = 0, 1

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]


ALONE = Alone()


def own_rows(rows: int, rank: int, count: int) -> slice:
    """Which of a tensor's `rows` process `rank` of `count` has."""
    each = -(-rows // count)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))


def write_shards(folder: Path, files: Mapping[str, Mapping[str, Tensor]], group: Group) -> dict[str, Content]:
    """Writes this process's rows of the tensors of each of `files` into `folder`, and returns what the shards contain.

    A single process writes the files whole, and returns nothing. Raises StorageError if a write fails.
    """
    written = {}
    with explained("write", folder):
        for name, tensors in files.items():
            path = folder / shard_name(name, group.rank, group.count)
            write_tensors(path, tensors)
            if group.count > 1:
                sync(path)  # The first process cannot do that on behalf of another machine.
                written[path.name] = content_of(path)
    return written
