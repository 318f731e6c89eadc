"""What each of several processes reads: its own rows of a step, and the files of a text once on each machine."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from cda_cli.config import DataConfig
from cda_cli.data import prepare, share_of
from cda_cli.training.distributed.launch import Place
from cda_cli.training.distributed.processes import Processes


def test_a_machine_looks_into_the_files_of_a_text_once(tmp_path: Path) -> None:
    """Its other processes are told what is in them. Another machine looks itself, and so does who has other files."""
    folder, store = tmp_path / "text", dist.HashStore()
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"document {number}")
    (folder / "binary").write_bytes(b"\0\1")

    def looks(place: Place) -> tuple[int, str]:
        """How often a process looks into files, and the tokens that it has."""
        processes, looked = Processes(place, store), []

        def once(key: str, find: Callable[[], str]) -> str:
            return processes.once_on_machine(key, lambda: looked.append(key) or find())  # type: ignore[func-returns-value]

        corpus = prepare(DataConfig(source=str(folder)), show_progress=False, once=once)
        assert corpus.description.endswith("20 files; left out: 1 binary")
        return len(looked), corpus.train.digest

    first = looks(Place(0, 4, 0, 2, 0))
    assert first[0] == 2, "neither the kinds of files nor their content"
    assert looks(Place(1, 4, 1, 2, 0)) == (0, first[1])
    assert looks(Place(2, 4, 0, 2, 1)) == first
    (folder / "0.txt").write_text("document x")
    (folder / "1.txt").write_text("document y")
    changed_text = looks(Place(3, 4, 1, 2, 1))
    assert changed_text[0] == 2
    assert changed_text[1] != first[1]


@pytest.mark.parametrize(("accumulated", "rows", "count"), [(1, 4, 2), (4, 1, 2), (2, 2, 4), (6, 3, 9), (3, 6, 2)])
def test_rows_are_shared_once_and_evenly(accumulated: int, rows: int, count: int) -> None:
    shares = [share_of(rank, count, rows, accumulated) for rank in range(count)]
    numbers = list(range(accumulated * rows))
    taken = [
        list(itertools.chain(*(numbers[at : at + size][own] for at in range(0, len(numbers), size))))
        for size, _, own in shares
    ]
    assert sorted(itertools.chain(*taken)) == numbers
    assert {len(part) for part in taken} == {accumulated * rows // count}
    assert all(len(numbers[:size][own]) <= rows for size, _, own in shares)
    assert {size * batches for size, batches, _ in shares} == {len(numbers)}
