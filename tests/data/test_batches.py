"""tokens → batches: each token a target exactly once, and positions that resume exactly."""

from __future__ import annotations

import json
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.data import (
    IGNORE,
    Batch,
    ByteTokenizer,
    Corpus,
    Tokens,
    TrainBatches,
    check_lengths,
    count_windows,
    evaluation_batches,
    share_of,
)
from cda_cli.errors import DataError

SHAPES = st.tuples(st.integers(3, 60), st.integers(1, 20), st.integers(1, 5)).filter(lambda shape: shape[0] > shape[1])


def numbered(count: int) -> Tokens:
    """Tokens that are their own places; each stands for its number modulo 3 of bytes."""
    ids = np.arange(count, dtype=np.uint16)
    return Tokens(ids, ids % 3, int((ids % 3).sum()))


def targets(batches: list[Batch]) -> list[int]:
    flat = torch.cat([batch.targets.flatten() for batch in batches])
    return flat[flat != IGNORE].tolist()


def same(left: Batch, right: Batch) -> bool:
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in vars(left))


@given(SHAPES)
def test_evaluation_counts_each_token_but_the_first_once_in_order(shape: tuple[int, int, int]) -> None:
    count, seq_len, batch_size = shape
    batches = list(evaluation_batches(numbered(count), seq_len, batch_size))
    assert targets(batches) == list(range(1, count))
    for batch in batches:
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert batch.inputs.shape == batch.targets.shape
        assert batch.inputs.shape[1] == seq_len
        counted = batch.targets != IGNORE
        assert torch.equal(batch.targets[counted], batch.inputs[counted] + 1), "a target is not the next token"
        assert torch.equal(batch.target_bytes, (batch.targets % 3 * counted).sum(-1)), "bytes of other tokens"
    assert [len(batch.inputs) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


def test_evaluation_stops_after_max_batches() -> None:
    assert targets(list(evaluation_batches(numbered(100), 10, 3, max_batches=2))) == list(range(1, 61))
    assert targets(list(evaluation_batches(numbered(100), 10, 3, max_batches=99))) == list(range(1, 100))


@given(SHAPES, st.integers(0, 5), st.booleans())
def test_a_pass_of_training_counts_each_token_but_the_first_once(
    shape: tuple[int, int, int], seed: int, shifted: bool
) -> None:
    count, seq_len, _ = shape
    batches = TrainBatches(numbered(count), seq_len, 1, seed, shifted=shifted)
    for _ in range(3):
        found: list[int] = []
        while len(found) < count - 1:
            batch, _ = next(batches)
            assert batch.inputs.shape == (1, seq_len)
            found += targets([batch])
        assert sorted(found) == list(range(1, count))


def test_shifted_windows_begin_elsewhere_in_each_pass() -> None:
    def starts(shifted: bool) -> list[set[int]]:
        batches = TrainBatches(numbered(161), 16, 1, 0, shifted=shifted)
        return [{int(next(batches)[0].inputs[0, 0]) for _ in range(9)} for _ in range(3)]

    assert len({start % 16 for starts_of_pass in starts(shifted=False) for start in starts_of_pass}) == 1
    assert len({start % 16 for starts_of_pass in starts(shifted=True) for start in starts_of_pass}) >= 3
    _, state = next(TrainBatches(numbered(161), 16, 1, 0, shifted=True))
    with pytest.raises(DataError, match="shifted"):
        TrainBatches(numbered(161), 16, 1, 0, state)


class Seen:
    """Numbers that remember which of them were read."""

    def __init__(self, values: np.ndarray) -> None:
        self._values, self.places = values, set[int]()

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        self.places |= set(places.flatten().tolist())
        return self._values[places]


@given(SHAPES, st.integers(1, 4), st.integers(1, 4))
def test_processes_read_their_own_rows_of_the_batches_of_one(
    shape: tuple[int, int, int], accumulated: int, count: int
) -> None:
    length, seq_len, rows = shape
    rows *= count
    step = [batch for batch, _ in islice(TrainBatches(numbered(length), seq_len, rows, 0), accumulated)]
    after = [state for _, state in islice(TrainBatches(numbered(length), seq_len, rows, 0), accumulated)][-1]
    found = []
    for rank in range(count):
        whole = numbered(length)
        seen = Tokens(Seen(whole.ids), Seen(whole.sizes), whole.text_bytes)  # type: ignore[arg-type]
        share = share_of(rank, count, rows, accumulated)
        own, states = zip(
            *islice(TrainBatches(seen, seq_len, share.size, 0, None, share.rows), share.batches), strict=True
        )
        assert states[-1] == after
        read = {
            number for batch in own for row in (batch.inputs, batch.inputs + 1) for number in row.flatten().tolist()
        }
        assert seen.ids.places == seen.sizes.places == read, "tokens of other processes were read"  # type: ignore[attr-defined]
        found.append(own)
    for name in ("inputs", "targets", "target_bytes"):
        together = [getattr(batch, name) for one in zip(*found, strict=True) for batch in one]
        assert torch.equal(torch.cat(together), torch.cat([getattr(batch, name) for batch in step]))


@given(SHAPES, st.lists(st.integers(0, 12), min_size=1, max_size=3), st.booleans())
def test_training_resumes_exactly_again_and_again(shape: tuple[int, int, int], stops: list[int], shifted: bool) -> None:
    count, seq_len, batch_size = shape
    batches_from = partial(TrainBatches, numbered(count), seq_len, batch_size, 1, shifted=shifted)
    through = list(islice(batches_from(), sum(stops) + 5))
    state, at = None, 0
    for stop in stops:
        for batch, after in islice(batches_from(state), stop):
            assert same(batch, through[at][0]), f"batch {at} differs after resuming"
            assert after == through[at][1]
            state, at = json.loads(json.dumps(after)), at + 1
    for batch, _ in islice(batches_from(state), 5):
        assert same(batch, through[at][0])
        at += 1


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    def orders(seed: int) -> list[list[int]]:
        batches = [batch for batch, _ in islice(TrainBatches(numbered(401), 4, 100, seed), 2)]
        return [batch.inputs[:, 0].tolist() for batch in batches]

    assert orders(0) == orders(0)
    assert orders(0)[0] != orders(0)[1], "the second pass repeats the order of the first"
    assert orders(0)[0] != orders(1)[0], "the seed does not change the order"
    assert orders(0)[1] != orders(1)[0], "a pass of one seed is a pass of the next"
    assert orders(0)[0] != sorted(orders(0)[0]), "the windows are not shuffled"


def test_a_position_of_other_data_is_one_sentence() -> None:
    _, state = next(TrainBatches(numbered(100), 10, 2, 0))
    with pytest.raises(DataError, match=r"is for seq_len 10, and this run has 20; resume with"):
        TrainBatches(numbered(100), 20, 2, 0, state)
    with pytest.raises(DataError, match=r"is for tokens 100, and this run has 101; resume with"):
        TrainBatches(numbered(101), 10, 2, 0, state)


@pytest.mark.parametrize("change", [{"position": 11}, {"position": -1}, {"epoch": "1"}, {"seed": None}])
def test_a_position_that_cannot_be_is_refused(change: dict[str, object]) -> None:
    """Beyond the last window there is no next one: a batch would be waited for without end."""
    _, state = next(TrainBatches(numbered(100), 10, 2, 0))
    TrainBatches(numbered(100), 10, 2, 0, state | {"position": 10})
    with pytest.raises(DataError, match=r"the saved data position has \w+ .*; use an earlier checkpoint"):
        TrainBatches(numbered(100), 10, 2, 0, state | change)


def test_a_text_shorter_than_one_sequence_names_the_length_that_fits() -> None:
    assert count_windows(numbered(9), 8) == 1
    with pytest.raises(DataError, match=r"training text is shorter than one sequence.*; --seq-len 7 would fit$"):
        TrainBatches(numbered(8), 8, 1, 0)
    with pytest.raises(DataError, match=r"give --data more text$"):
        count_windows(numbered(1), 8)
    corpus = Corpus(ByteTokenizer(), numbered(100), numbered(8), "numbers", from_cache=False)
    check_lengths(corpus, 7)
    with pytest.raises(DataError, match=r"validation is shorter.*; --seq-len 7 would fit, or .*validation_fraction$"):
        check_lengths(corpus, 8)


@given(st.integers(2, 20), st.integers(20, 40))
def test_a_text_shorter_than_one_sequence_is_evaluated_in_a_shorter_window(count: int, seq_len: int) -> None:
    [batch] = evaluation_batches(numbered(count), seq_len, 4)
    assert batch.inputs.tolist() == [list(range(count - 1))]
    assert batch.targets.tolist() == [list(range(1, count))]
    assert batch.target_bytes.tolist() == [sum(number % 3 for number in range(1, count))]


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_token_predicts_nothing(count: int) -> None:
    with pytest.raises(DataError, match=r"takes 2 at least.*; give --data more text$"):
        evaluation_batches(numbered(count), 8, 1)
