"""documents → batches without preparing: the same text, and positions that resume exactly."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch

from cda_cli.config import DataConfig
from cda_cli.data import (
    Batch,
    ByteTokenizer,
    Encoded,
    StreamedBatches,
    load_tokenizer,
    prepare,
    share_of,
    streamed_source,
    streamed_validation,
)
from cda_cli.errors import DataError
from tests.data.samples import LETTERS, UNICODE

ROWS = [*LETTERS[:12], "é", UNICODE * 3]
SEPARATOR = b"\xff"


@pytest.fixture(params=["rows.jsonl", "rows-*.jsonl", "text-*.txt", "text-*.gz", "hf:owner/name"])
def config(request: pytest.FixtureRequest, folder: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Documents of ROWS in one file of rows, in many, a file each, packed, and as a dataset with its own splits."""

    def write(path: Path, rows: list[str]) -> None:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

    write(folder / "rows.jsonl", ROWS)
    for index, row in enumerate(ROWS):
        write(folder / f"rows-{index // 4}.jsonl", ROWS[index // 4 * 4 : index // 4 * 4 + 4])
        (folder / f"text-{index:02}.txt").write_bytes(row.encode())
        (folder / f"text-{index:02}.gz").write_bytes(gzip.compress(row.encode()))
    home = folder / "owner" / "name"
    home.mkdir(parents=True)
    # A list, unlike lines, does not tell `datasets` its columns beforehand.
    (home / "train.json").write_text(json.dumps([{"text": row} for row in ROWS]))
    (home / "test.json").write_text(json.dumps([{"text": row} for row in LETTERS[20:]]))
    monkeypatch.chdir(folder)
    return DataConfig(source=request.param, streaming=True, validation_fraction=0.3)


def batches(
    config: DataConfig, state: object = None, shape: tuple[int, int] = (16, 3), tokenizer: str = "bytes"
) -> StreamedBatches:
    return StreamedBatches(config, load_tokenizer(tokenizer), *shape, state)  # type: ignore[arg-type]


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in vars(left))


def test_a_stream_is_the_prepared_text_over_and_over(config: DataConfig) -> None:
    corpus = prepare(config, show_progress=False)
    expected = corpus.train.ids.tobytes() * 4
    count = (len(expected) - 1) // 48
    inputs = [batch.inputs for batch, _ in islice(batches(config), count)]
    assert bytes(torch.cat(inputs).flatten().tolist()) == expected[: count * 48]
    targets = [batch.targets for batch, _ in islice(batches(config), count)]
    assert bytes(torch.cat(targets).flatten().tolist()) == expected[1 : count * 48 + 1]
    sizes = [batch.target_bytes.sum().item() for batch, _ in islice(batches(config), count)]
    assert sum(sizes) == count * 48 - expected[1 : count * 48 + 1].count(b"\xff"), "a separator stands for no text"


def test_validation_is_the_prepared_validation(config: DataConfig) -> None:
    corpus = prepare(config, show_progress=False)
    tokens = streamed_validation(config, ByteTokenizer(), 10**9)
    assert tokens.ids.tobytes() == corpus.validation.ids.tobytes()
    assert tokens.sizes.tobytes() == corpus.validation.sizes.tobytes()
    assert (tokens.text_bytes, tokens.lost_bytes) == (corpus.validation.text_bytes, 0)
    some = streamed_validation(config, ByteTokenizer(), 5)
    assert corpus.validation.ids.tobytes().startswith(some.ids.tobytes())
    assert 5 <= len(some) < len(tokens)


def test_a_stream_resumes_exactly_at_every_point(config: DataConfig) -> None:
    through = list(islice(batches(config), 40))
    assert through[-8][1]["epoch"] >= 1, "the test must cross into another pass"
    for start in range(0, 32):
        state = json.loads(json.dumps(through[start][1]))
        at = start + 1
        for length in (1, 2, 3):  # a second and a third resume
            for batch, after in islice(batches(config, state), length):
                assert same(batch, through[at][0]), f"batch {at} differs after resuming"
                # The library's own part of the position may be worded differently for the same place.
                assert (after["epoch"], after["offset"]) == (through[at][1]["epoch"], through[at][1]["offset"])
                state, at = json.loads(json.dumps(after)), at + 1


def test_a_position_is_small(config: DataConfig) -> None:
    for _, state in islice(batches(config, shape=(256, 2)), 10):
        assert len(json.dumps(state)) < 1500


def test_a_json_tokenizer_streams_and_resumes(config: DataConfig, bpe_file: Path) -> None:
    through = list(islice(batches(config, tokenizer=str(bpe_file)), 12))
    for start in range(8):
        batch, _ = next(batches(config, through[start][1], tokenizer=str(bpe_file)))
        assert same(batch, through[start + 1][0])


def test_the_standard_library_streams() -> None:
    stream = batches(DataConfig(streaming=True), shape=(128, 4))
    through = list(islice(stream, 20))
    batch, _ = next(batches(DataConfig(streaming=True), through[10][1], shape=(128, 4)))
    assert same(batch, through[11][0])


def test_nothing_is_prepared(folder: Path, cache: Path) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    next(batches(DataConfig(source=str(folder / "rows.jsonl"), streaming=True)))
    assert not cache.exists()


def test_a_position_of_another_run_is_one_sentence(folder: Path, bpe_file: Path) -> None:
    for name, rows in (("a", ROWS), ("b", ROWS[::-1])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    config = DataConfig(source=str(folder / "a.jsonl"), streaming=True)
    _, state = next(batches(config))
    with pytest.raises(DataError, match=r"^the saved data position is for data .*; resume with the data"):
        batches(config.model_copy(update={"source": str(folder / "b.jsonl")}), state)
    with pytest.raises(DataError, match=r"^the saved data position is for tokenizer bytes.*; resume with the data"):
        batches(config, state, tokenizer=str(bpe_file))


def test_faults_of_a_stream_are_one_sentence(folder: Path) -> None:
    (folder / "one.txt").write_text("text " * 100)
    (folder / "one.jsonl").write_text('{"text": "the only row"}\n')
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in LETTERS))

    def config(name: str, **settings: object) -> DataConfig:
        return DataConfig(source=str(folder / name), streaming=True, **settings)

    with pytest.raises(DataError, match=r"is a single document, which cannot be streamed.*; leave out --streaming$"):
        batches(config("one.txt"))
    with pytest.raises(DataError, match=r"is a single document, which cannot be streamed.*; leave out --streaming$"):
        streamed_validation(config("one.txt"), ByteTokenizer(), 10)
    with pytest.raises(DataError, match=r"has 0 tokens to train on, .*; give --data more text, or leave out"):
        next(batches(config("one.jsonl", validation_fraction=0.9999)))
    with pytest.raises(DataError, match=r"has 13 tokens to train on, and seq_len 16 takes 17; give --data more text"):
        next(batches(config("one.jsonl", validation_fraction=0.0001)))
    with pytest.raises(DataError, match=r"no document of .* is held out; raise --set data\.validation_fraction, or"):
        streamed_validation(config("rows.jsonl", validation_fraction=0.0001), ByteTokenizer(), 10)
    with pytest.raises(DataError, match=r"has no column 'body'; choose --text-column from text$"):
        next(batches(config("rows.jsonl", text_column="body")))


class Counting(ByteTokenizer):
    """Counts the characters that it encodes. `done` is released once for each part of a stream."""

    def __init__(self) -> None:
        self.characters, self.done = 0, threading.Semaphore(0)

    def encode_batch(self, pieces: Sequence[str]) -> list[Encoded]:
        encoded = super().encode_batch(pieces)
        self.characters += sum(map(len, pieces))
        self.done.release()
        return encoded


class Worker:
    """One of the threads that make a stream together. They share `values`, with one of each."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self._rank, self._values, self._barrier = rank, values, barrier
        self.count, self.first, self.parts = len(values), rank == 0, 0

    def scatter(self, values: Sequence[Any] | None) -> Any:
        part = self._exchange(values)[0][self._rank]
        self.parts += not isinstance(part, DataError)
        return part

    def gather(self, value: Any) -> list[Any]:
        return self._exchange(value)

    def _exchange(self, value: Any) -> list[Any]:
        self._values[self._rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


def together(
    config: DataConfig, workers: int, length: int, state: Any = None, batch_size: int = 2, accumulated: int = 2
) -> tuple[list[torch.Tensor], Any, list[int]]:
    """Reads `length` steps of a stream with so many workers.

    Returns the inputs, targets and bytes of each step, row by row and joined over the workers, the last state, and the
    characters that each worker has encoded.
    """
    source, values, barrier = streamed_source(config), [None] * workers, threading.Barrier(workers, timeout=60)

    def work(rank: int) -> tuple[list[list[torch.Tensor]], Any, int]:
        share, tokenizer = share_of(rank, workers, batch_size, accumulated), Counting()
        own = source if rank == 0 else source.without_documents()
        worker = Worker(rank, values, barrier)
        stream = StreamedBatches(config, tokenizer, 16, share.size, state, share.rows, own, worker, share.batches)
        steps, after = [], state
        for _ in range(length):
            made, states = zip(*islice(stream, share.batches), strict=True)
            steps.append([told(batch) for batch in made])
            after = states[-1]
        # A thread may still encode what would be needed next.
        for _ in range(worker.parts):
            assert tokenizer.done.acquire(timeout=60), "a part that the worker got was not encoded"
        return steps, after, tokenizer.characters

    with ThreadPoolExecutor(workers) as threads:
        ranks, states, characters = zip(*threads.map(work, range(workers)), strict=True)
    assert all(one == states[0] for one in states), "the processes are in different places"
    steps = []
    for step in zip(*ranks, strict=True):
        # The batches that are trained on at the same time lie side by side in the text.
        steps.append(torch.cat(list(chain(*zip(*step, strict=True)))))
    return steps, states[0], list(characters)


def told(batch: Batch) -> torch.Tensor:
    return torch.cat([batch.inputs, batch.targets, batch.target_bytes[:, None]], 1)


@pytest.mark.parametrize("workers", [2, 4])
def test_several_processes_have_the_stream_of_one(config: DataConfig, workers: int) -> None:
    """Together they have its rows, in its order. Any other number of processes goes on from each place."""
    alone = [told(batch) for batch, _ in islice(batches(config, shape=(16, 4)), 14)]
    found, state, _ = together(config, workers, 9)
    rest, _, _ = together(config, 6 - workers, 4, json.loads(json.dumps(state)))
    last, _ = next(batches(config, json.loads(json.dumps(state)), shape=(16, 4)))
    for number, (one, several) in enumerate(zip(alone, found + rest, strict=False)):
        assert torch.equal(one, several), f"step {number} differs"
    assert torch.equal(told(last), alone[9])


@pytest.fixture
def long(folder: Path) -> DataConfig:
    """Two documents that are longer than what a tokenizer takes at once, and a short one between them."""
    texts = ["".join(chr(97 + number * number % 26) for number in range(length)) for length in (300_000, 20, 200_000)]
    (folder / "long.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(source=str(folder / "long.jsonl"), streaming=True, validation_fraction=1e-9)


def test_each_process_tokenises_its_part(long: DataConfig) -> None:
    """Long documents are shared too, and a position may lie in the midst of one."""
    alone = batches(long, shape=(16, 8192))
    expected = [told(batch) for batch, _ in islice(alone, 5)]
    found, state, characters = together(long, 2, 3, batch_size=4096)
    assert 0 < state["offset"] < 500_000
    rest, _, _ = together(long, 4, 2, json.loads(json.dumps(state)), batch_size=4096)
    assert all(torch.equal(one, several) for one, several in zip(expected, found + rest, strict=True))
    assert sum(characters) >= 3 * 8192 * 16
    assert max(characters) <= sum(characters) / 2 + 2**17, "a process tokenised the part of another"


def test_a_fault_comes_to_all_processes_in_its_turn(folder: Path) -> None:
    good = "".join(json.dumps({"text": text}) + "\n" for text in LETTERS)
    (folder / "rows.jsonl").write_text(good + "no JSON\n")
    config = DataConfig(source=str(folder / "rows.jsonl"), streaming=True, validation_fraction=1e-9)
    steps = (sum(len(text.encode()) + 1 for text in LETTERS) - 1) // 64
    found, state, _ = together(config, 2, steps)
    assert len(found) == steps, "the text before the fault is good"
    with pytest.raises(DataError, match=rf"^line {len(LETTERS) + 1} of .* is not JSON"):
        together(config, 2, 1, state)
