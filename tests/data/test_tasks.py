"""Synthetic tasks: an exact solver, the same example from the same seed and index, and nothing that tells two ways."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.data import (
    IGNORE,
    TASKS,
    Task,
    TaskBatches,
    evaluation_batches,
    parse_task,
    task_of_length,
    task_tokenizer,
    task_tokens,
)
from cda_cli.data.tasks.base import HIDDEN, WORDS, Draws, Example
from cda_cli.data.tasks.recall import Mqar, Mqmtar
from cda_cli.errors import DataError

LENGTHS = st.tuples(st.integers(1, 40), st.integers(0, 24))


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """Any task, with any parameters that fit together."""
    name = draw(st.sampled_from(sorted(TASKS)))
    least, more = draw(LENGTHS)
    density = draw(st.sampled_from([0.1, 0.25, 0.5, 0.8, 1.0]))
    values: dict[str, object] = {"vocab": draw(st.integers(2, 40))}
    if name == "needle":
        values["passkey"] = draw(st.integers(1, 8))
        least += values["passkey"]
    elif name == "induction":
        least += 2
    elif name == "mqar":
        density = min(density, 0.5)
        least += int(2 / density)
        values = {"vocab": least + more + draw(st.integers(0, 9)), "density": density}
        values["power"] = draw(st.sampled_from([0.01, 0.5, 1.0, 2.0]))
    elif name == "mqmtar":
        sizes = {"key_len": draw(st.integers(1, 3)), "value_len": draw(st.integers(1, 3))}
        least += int((sum(sizes.values()) + 2) / density) + 1
        words = draw(st.integers(1, int(values["vocab"]) ** min(sizes.values())))
        values |= {"density": density, "queries": draw(st.integers(1, 5)), "words": min(words, 200), **sizes}
    return TASKS[name].model_validate({"length": f"{least}..{least + more}", **values})


def same(one: Example, other: Example) -> bool:
    return all(np.array_equal(*both) for both in zip(one, other, strict=True))


@given(tasks(), st.integers(0, 2**32), st.integers(0, 2**40))
def test_the_solver_finds_every_answer(task: Task, seed: int, index: int) -> None:
    example = task.example("train", seed, index)
    assert np.array_equal(task.solve(example.hidden), example.tokens)
    assert (example.hidden == HIDDEN).sum() == example.is_answer.sum() > 0
    assert not example.is_answer[0], "nothing stands before the first token to predict it from"


@given(tasks(), st.integers(0, 2**32), st.integers(0, 2**40))
def test_an_example_has_its_length_and_its_symbols(task: Task, seed: int, index: int) -> None:
    """The tokens that a length makes decide how long a sequence must be, and how examples are stacked."""
    tokens = task.example("train", seed, index).tokens
    assert len(tokens) <= task.tokens_of(task.length.most)
    for length in (task.length.least, task.length.most):
        example = task_of_length(task, length).example("validation", seed, index)
        assert len(example.tokens) == task.tokens_of(length)
    assert tokens.min() >= 0
    assert tokens.max() <= task.word("<eos>") == task_tokenizer(task).vocab_size - 1


@given(tasks(), st.integers(0, 2**32))
def test_seed_part_and_index_decide_an_example(task: Task, seed: int) -> None:
    """In any order, and by another object of the same task. Parameters as text make the same task."""
    forwards = [task.example("train", seed, index) for index in range(4)]
    again = parse_task(task.spec)
    assert again == task
    assert all(same(forwards[index], again.example("train", seed, index)) for index in (3, 1, 0, 2))


def test_parts_seeds_and_indices_have_examples_of_their_own() -> None:
    """Forty examples of thirty-two symbols and more: two that agree would not be drawn apart."""
    task = parse_task("task:copy")
    keys = [(part, seed, index) for part in ("train", "validation") for seed in range(4) for index in range(5)]
    drawn = {tuple(task.example(part, seed, index).tokens) for part, seed, index in keys}  # type: ignore[arg-type]
    assert len(drawn) == len(keys)


WRITTEN = {
    "task:copy?length=4&vocab=8": "<bos> 5 0 6 6 <sep> [5] [0] [6] [6] [<eos>]",
    "task:reverse?length=4&vocab=8": "<bos> 2 4 1 7 <sep> [7] [1] [4] [2] [<eos>]",
    "task:sort?length=4&vocab=8": "<bos> 0 5 1 1 <sep> [0] [1] [1] [5] [<eos>]",
    "task:mqar?length=16&vocab=20&density=0.25": "8 15 0 11 8 [15] 0 [11] 7 14 2 17 11 11 2 3",
    "task:mqmtar?length=14&vocab=8&queries=1&words=64": (
        "<bos> <space> <space> <space> <space> 7 2 <value> 5 3 <space> <space> <space> <space> <space> "
        "<query> 7 2 <sep> [<query>] [5] [3] [<eos>]"
    ),
    "task:needle?length=6&vocab=8&passkey=2": "<bos> <needle> 7 0 7 4 6 <sep> <needle> [7] [0] [<eos>]",
    "task:induction?length=8&vocab=4": "0 0 2 2 0 3 1 3 [1]",
}


@pytest.mark.parametrize("spec", WRITTEN)
def test_examples_are_those_of_every_machine_and_version(spec: str) -> None:
    """A run resumes on the same examples elsewhere, so they must never change."""
    task = parse_task(spec)
    words = [*map(str, range(task.vocab)), *WORDS]
    example = task.example("train", 7, 3)
    shown = [f"[{words[token]}]" if answer else words[token] for token, answer in zip(*example, strict=True)]
    assert " ".join(shown) == WRITTEN[spec]


@given(st.integers(1, 300), st.data())
def test_distinct_numbers_are_distinct(limit: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, limit))
    drawn = Draws(str(limit)).distinct(limit, count)
    assert len(set(drawn.tolist())) == len(drawn) == count
    assert not count or 0 <= drawn.min() <= drawn.max() < limit


def test_distinct_numbers_come_in_any_order() -> None:
    """Numbers in ascending order would give away a key by its place. Each of the two ways of drawing is tried."""
    for limit, count in ((6, 3), (40, 3)):
        firsts = [Draws(f"{limit}/{index}").distinct(limit, count)[0] for index in range(2000)]
        error = limit / np.sqrt(12 * len(firsts))  # of the mean of even numbers
        assert abs(np.mean(firsts) - (limit - 1) / 2) < 5 * error


@given(st.integers(8, 120), st.sampled_from([0.125, 0.25, 0.5]), st.integers(0, 2**32))
def test_no_filler_repeats_a_key(length: int, density: float, index: int) -> None:
    """With fillers of any symbol, a few symbols collide in nearly every example."""
    pairs = int(length * density / 2)
    if not pairs:
        return
    task = Mqar(length=length, vocab=2 * pairs + 1, density=density)  # type: ignore[arg-type]
    example = task.example("train", 0, index)
    keys = example.tokens[: 2 * pairs : 2]
    places = [np.flatnonzero(example.tokens == key) for key in keys]
    assert all(len(found) == 2 for found in places), "a key stands in its pair and in its query alone"
    assert sorted(int(found[1]) + 1 for found in places) == np.flatnonzero(example.is_answer).tolist()


@given(st.integers(20, 200), st.integers(0, 2**32))
def test_every_key_of_mqmtar_has_one_value(length: int, index: int) -> None:
    task = Mqmtar(length=length, vocab=4, words=16, key_len=2, value_len=2)  # type: ignore[arg-type]
    text = task.example("train", 0, index).tokens[1 : length + 1]
    marks = np.flatnonzero(text == task.word("<value>"))
    keys = {tuple(text[mark - 2 : mark]) for mark in marks}
    assert len(keys) == len(marks) == task.pairs(length)


def test_queries_of_mqar_come_soon() -> None:
    """With the power of the published settings most gaps are small, and with power 1 they are even."""
    for power, expected in ((0.01, False), (1.0, True)):
        task = Mqar(length=256, density=1 / 64, power=power)  # type: ignore[arg-type]
        gaps = [int(np.flatnonzero(task.example("train", 0, index).is_answer)[0]) - 4 for index in range(200)]
        assert (np.mean(gaps) > 60) == expected, f"power {power}: mean {np.mean(gaps)}"


BAD = {
    "task:sorted": "there is no task 'sorted': did you mean 'sort'?",
    "task:": "known: copy, induction, mqar, mqmtar, needle, reverse, sort",
    "task:sort?size=3": "task:sort has no parameter 'size': known: length, vocab",
    "task:sort?vocab=3&vocab=4": "gives vocab twice; give it once",
    "task:sort?vocab=1": "vocab: input should be greater than or equal to 2",
    "task:sort?vocab=many": "vocab: input should be a valid integer",
    "task:sort?length=64..32": "length: input should be a length such as 64, or a range of lengths such as 32..64",
    "task:sort?length=": "length: input should be a length such as 64",
    "task:needle?length=5": "a passkey of 5 takes a length of 6 or more, not 5",
    "task:induction?length=2": "induction takes a length of 3 or more, not 2",
    "task:mqar?length=8": "a length of 8 has no pair at density 0.125",
    "task:mqar?density=0.6": "density 0.6 leaves no room for the queries; make it 0.5 or less",
    "task:mqar?length=512&vocab=32": "vocab 32 has too few symbols for 32 keys and 32 values; make it 64 or more",
    "task:mqmtar?length=7": "a length of 7 has no pair at density 0.8",
    "task:mqmtar?vocab=8": "8 symbols make 64 different keys and values, not 10000",
}


@pytest.mark.parametrize("source", BAD)
def test_what_is_no_task_is_refused(source: str) -> None:
    with pytest.raises(DataError) as refused:
        parse_task(source)
    assert BAD[source] in str(refused.value)
    assert "\n" not in str(refused.value)


@given(tasks(), st.integers(1, 5), st.integers(1, 5))
def test_batches_hold_one_example_a_row(task: Task, batch_size: int, other_size: int) -> None:
    """And go on with the next example, whatever the size of a batch."""
    seq_len = task.tokens_of(task.length.most)
    batches = TaskBatches(task, seq_len, batch_size, seed=5)
    (first, place), following = next(batches), next(batches)[0]
    resumed = next(TaskBatches(task, seq_len, other_size, seed=0, state=place))[0]
    for row in range(batch_size):
        example = task.example("train", 5, row)
        N = len(example.tokens)
        assert first.inputs.shape == first.targets.shape == (batch_size, seq_len)
        assert np.array_equal(first.inputs[row, :N], example.tokens)
        assert (first.inputs[row, N:] == task.word("<pad>")).all()
        expected = np.where(example.is_answer, example.tokens, IGNORE)[1:]
        assert np.array_equal(first.targets[row, : N - 1], expected)
        assert (first.targets[row, N - 1 :] == IGNORE).all()
    shared = min(batch_size, other_size)
    assert (resumed.inputs[:shared] == following.inputs[:shared]).all()
    assert (resumed.targets[:shared] == following.targets[:shared]).all()
    rows = slice(batch_size // 2, batch_size)
    own, own_place = next(TaskBatches(task, seq_len, batch_size, seed=5, rows=rows))
    assert own_place == place
    assert torch.equal(own.inputs, first.inputs[rows]), "a process has other examples than its own"
    assert torch.equal(own.targets, first.targets[rows])


@given(tasks(), st.integers(1, 4), st.integers(0, 3))
def test_windows_of_the_validation_side_are_its_examples(task: Task, count: int, spare: int) -> None:
    seq_len = task.tokens_of(task.length.most) + spare
    (batch,) = evaluation_batches(task_tokens(task, seq_len, count), seq_len, batch_size=count)
    assert len(batch.inputs) == count
    for row in range(count):
        example = task.example("validation", 0, row)
        assert np.array_equal(batch.inputs[row, : len(example.tokens)], example.tokens)
        kept = batch.targets[row] != IGNORE
        assert np.array_equal(batch.targets[row][kept], example.tokens[example.is_answer])


@pytest.mark.parametrize("name", TASKS)
def test_the_tokenizer_writes_and_reads_examples(name: str) -> None:
    """So that a person can prompt a model of a task, and read what it says. Only <eos> cannot be written."""
    task = parse_task(f"task:{name}")
    tokenizer, tokens = task_tokenizer(task), task.example("train", 0, 0).tokens
    prompt = tokens[tokens != tokenizer.separator]
    assert tokenizer.separator == task.word("<eos>")
    assert np.array_equal(tokenizer.encode(tokenizer.decode(tokens)), prompt)


def test_an_example_that_is_longer_than_a_sequence_is_refused() -> None:
    task = parse_task("task:sort")
    for opened in (lambda: task_tokens(task, 130, 1), lambda: TaskBatches(task, 130, 1, 0)):
        with pytest.raises(DataError, match="up to 131 tokens, and seq_len is 130; give --seq-len 131, or a smaller"):
            opened()
    task_tokens(task, 131, 1)


def test_a_position_of_another_task_is_refused() -> None:
    place = TaskBatches(parse_task("task:sort"), 131, 1, 0).state()
    with pytest.raises(DataError, match="the saved data position is for task task:sort"):
        TaskBatches(parse_task("task:copy"), 131, 1, 0, place)
    with pytest.raises(DataError, match="the saved data position has position -1; use an earlier checkpoint"):
        TaskBatches(parse_task("task:sort"), 131, 1, 0, place | {"position": -1})
