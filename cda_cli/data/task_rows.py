"""Examples of a task → rows of tokens: one example a row, padded; the loss is that of its answer.

Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cda_cli.data.batches import Batch, State, check_counts, check_state, to_batch
from cda_cli.data.prepare import Tokens
from cda_cli.data.tasks import PREFIX, WORDS, Example, Task
from cda_cli.data.tokenizers import JsonTokenizer, Tokenizer, tokenizer_from_json
from cda_cli.errors import DataError

VALIDATION_SEED = 0  # for every run, so that runs of several seeds are compared on the same examples


def task_tokenizer(task: Task) -> JsonTokenizer:
    """The tokenizer of the task: its symbols are written as numbers, between spaces, and `<eos>` ends an example."""
    words = [*map(str, range(task.vocab)), *WORDS]
    document = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": len(words) - 1,
                "content": words[-1],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: token for token, word in enumerate(words[:-1])},
            "unk_token": "<unk>",
        },
    }
    found = tokenizer_from_json(json.dumps(document), f"{PREFIX}{task.registered}")
    assert isinstance(found, JsonTokenizer)
    return found


def check_task_tokenizer(task: Task, tokenizer: Tokenizer, model: str = "the model") -> None:
    """Raises DataError, in which `model` is called so, if its `tokenizer` is not that of `task`."""
    if tokenizer.fingerprint != task_tokenizer(task).fingerprint:
        of_any_length = task.spec_of(task.model_dump(mode="json", exclude_defaults=True, exclude={"length"}))
        raise DataError(
            f"{model} was not trained on the {task.vocab} symbols of {PREFIX}{task.registered}; give the vocab of "
            f"its own task, or train one with --data '{of_any_length}'"
        )


def check_rows(task: Task, seq_len: int) -> None:
    """Raises DataError if the longest example does not fit into a row of `seq_len` tokens."""
    longest = task.tokens_of(task.length.most)
    if longest > seq_len:
        raise DataError(
            f"an example of {task.spec} has up to {longest} tokens, and seq_len is {seq_len}; give --seq-len "
            f"{longest}, or a smaller length"
        )


def task_tokens(task: Task, seq_len: int, examples: int) -> Tokens:
    """The first examples of the validation side, in rows of `seq_len` tokens that follow each other.

    A window of `seq_len` (see `batches`) is an example. Raises DataError if one does not fit into it.
    """
    check_rows(task, seq_len)
    rows, is_answer = task.rows("validation", VALIDATION_SEED, 0, examples, seq_len)
    ids = np.append(rows.reshape(-1), task.word("<pad>"))  # the last input has a target too
    targets = np.append(is_answer.reshape(-1), False)
    sizes = _sizes(task)[ids]
    return Tokens(ids, sizes, int(sizes.sum()), is_target=targets)


def _sizes(task: Task) -> Any:
    """The bytes of each token [V] as it is written. A special token, and padding, stand for none."""
    return np.array([len(str(symbol)) for symbol in range(task.vocab)] + [0] * len(WORDS))


def task_examples(task: Task, first: int, count: int) -> Example:
    """The examples of the validation side from number `first`, stacked. The task must have one length."""
    return task.rows("validation", VALIDATION_SEED, first, count, task.tokens_of(task.length.most))


class TaskBatches:
    """An endless iterator of (batch, state): the state, small plain JSON, resumes *after* that batch.

    Row by row the batches are the examples of the training side from number 0. A given `state` brings its seed; its
    batch size may have been another. Raises DataError if an example does not fit into `seq_len` tokens, or if `state`
    belongs to another task or seq_len. Only the `rows` of each batch are made, as those of `TrainBatches` are.
    """

    def __init__(
        self,
        task: Task,
        seq_len: int,
        batch_size: int,
        seed: int,
        state: Mapping[str, Any] | None = None,
        rows: slice = slice(None),
    ) -> None:
        check_rows(task, seq_len)
        self._task, self._seq_len, self._batch_size = task, seq_len, batch_size
        self._rows = range(batch_size)[rows]
        self._seed, self._position = seed, 0
        self._token_sizes = _sizes(task)
        if state is not None:
            check_state(state, {"task": task.spec, "seq_len": seq_len})
            check_counts(state, {"seed": 2**63, "position": 2**63})
            self._seed, self._position = state["seed"], state["position"]

    def __iter__(self) -> Iterator[tuple[Batch, State]]:
        return self

    def __next__(self) -> tuple[Batch, State]:
        first = self._position + self._rows.start
        rows, is_answer = self._task.rows("train", self._seed, first, len(self._rows), self._seq_len + 1)
        self._position += self._batch_size
        return to_batch(rows, self._token_sizes[rows], is_answer[:, 1:]), self.state()

    def state(self) -> State:
        """The place of the iterator: the number of the next example."""
        return {"seed": self._seed, "position": self._position, "task": self._task.spec, "seq_len": self._seq_len}
