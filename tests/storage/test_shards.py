"""What several processes save together comes back whole, or by rows, whatever their number."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.errors import CheckpointError, StorageError
from cda_cli.storage import load, newest, open_checkpoint, own_rows, publish, recorded_sha256, verify


class Threads:
    """A `Group` whose processes are threads."""

    def __init__(self, rank: int, count: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.count = rank, count
        self._values, self._barrier = values, barrier

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


def saved(run: Path, count: int, tensors: dict[str, Tensor], step: int = 1) -> Path:
    """Saves `tensors` as weights, as moments and as the average, in `count` shards."""
    values, barrier = [None] * count, threading.Barrier(count)

    def save(rank: int) -> Path:
        try:
            own = {
                name: tensor[own_rows(len(tensor), rank, count)] if tensor.ndim else tensor
                for name, tensor in tensors.items()
                if tensor.ndim or rank == 0
            }
            group = Threads(rank, count, values, barrier)
            return publish(run, step=step, model=own, optimizer=own, rng=own, ema=own, state={}, group=group)
        except StorageError:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as threads:
        return set(threads.map(save, range(count))).pop()


@settings(max_examples=12)
@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from([torch.float32, torch.bfloat16])),
        min_size=1,
    ),
    st.integers(2, 4),
    st.integers(1, 4),
)
def test_shards_come_back_whole_and_by_rows(tmp_path_factory, specs, count: int, readers: int) -> None:
    """Any other number of processes finds its rows, even where there are fewer rows than processes."""
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in specs.items()}
    path = saved(tmp_path_factory.mktemp("run"), count, tensors)
    whole, opened = load(path), open_checkpoint(path)
    for part in ("model", "optimizer", "ema"):
        assert getattr(whole, part).keys() == getattr(opened, part).keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(getattr(whole, part)[name], tensor, rtol=0, atol=0)
            stored = getattr(opened, part)[name]
            assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype)
            each = [own_rows(len(tensor), rank, readers) for rank in range(readers)] if tensor.ndim else []
            read = [stored.read(rows.start, rows.stop) for rows in each] or [stored.read()]
            torch.testing.assert_close(torch.cat(read) if each else read[0], tensor, rtol=0, atol=0)


def test_a_process_reads_and_checks_only_the_shards_of_its_rows(tmp_path: Path) -> None:
    path = saved(tmp_path, 2, {"w": torch.arange(8.0)})
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    stored = open_checkpoint(path).model["w"]
    assert stored.read(0, 4).tolist() == [0, 1, 2, 3]
    for rows in ((3, 5), (4, 8)):
        with pytest.raises(CheckpointError, match=f"{file.name} is damaged"):
            stored.read(*rows)
    assert newest(tmp_path) == (None, [f"{file} is damaged (its SHA-256 is not the manifest's)"])


def test_a_checkpoint_that_is_released_keeps_no_file_open(tmp_path: Path) -> None:
    """The disk would keep the content of a checkpoint that a resumed run has pruned, for as long as the run lasts."""
    path, held = saved(tmp_path, 2, {"w": torch.arange(8.0)}), Path("/proc/self/maps")
    opened = open_checkpoint(path)
    assert opened.model["w"].read().tolist() == list(range(8))
    assert str(path) in held.read_text(encoding="utf-8")
    opened.release()
    assert str(path) not in held.read_text(encoding="utf-8")


def test_a_missing_shard_and_one_of_another_number_are_named(tmp_path: Path) -> None:
    path, other = (saved(tmp_path / str(count), count, {"w": torch.arange(8.0)}) for count in (2, 3))
    file = path / "optimizer-00001-of-00002.safetensors"
    moved = file.rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=f"{file.name} is missing"):
        verify(path, hashed=())
    moved.rename(file)
    (other / "ema-00002-of-00003.safetensors").rename(path / "ema-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="is not in the manifest"):
        verify(path)


def test_weights_in_shards_have_one_sha256(tmp_path: Path) -> None:
    """Results that were made with them are found by it."""
    first, same, other = (
        saved(tmp_path / name, 2, {"w": torch.full((4,), value)})
        for name, value in (("first", 1.0), ("same", 1.0), ("other", 2.0))
    )
    digests = [recorded_sha256(path)["model.safetensors"] for path in (first, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert all(len(digest) == 64 for digest in digests)
