"""What a synthetic task is: an endless row of examples, each made from a seed and an index, and their exact solution.

Shapes: N tokens of an example, A of its answer; E examples.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import blake2b
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Ints = NDArray[np.int64]
Part = Literal["train", "validation"]

PREFIX = "task:"
# Every task has these words behind its symbols, whether it writes them or not: models of one vocabulary fit all tasks.
WORDS = ("<pad>", "<bos>", "<sep>", "<space>", "<value>", "<query>", "<needle>", "<eos>")
HIDDEN = -1  # stands for a token of an answer, where a solver is to find it


class Range(NamedTuple):
    """The whole numbers from `least` to `most`, both included."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}..{self.most}"


def _read_range(value: object) -> object:
    if isinstance(value, int):
        return Range(value, value)
    found = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", value) if isinstance(value, str) else None
    if found is None:
        return value if isinstance(value, Range) else Range(0, 0)  # which is refused below
    return Range(int(found[1]), int(found[2] or found[1]))


def _is_range(value: Range) -> Range:
    if not 1 <= value.least <= value.most:
        raise ValueError("input should be a length such as 64, or a range of lengths such as 32..64")
    return value


Length = Annotated[Range, BeforeValidator(lambda value: _is_range(_read_range(value))), PlainSerializer(str)]
Symbols = Annotated[int, Field(description="Number of symbols.", ge=2, le=2**20)]


class Example(NamedTuple):
    """`tokens` [N], and `is_answer` [N], bool: which of them are to be predicted, each from those before it.

    Several examples of one length, or padded to one, may be stacked: then both are [E, N].
    """

    tokens: Ints
    is_answer: NDArray[np.bool_]

    @property
    def hidden(self) -> Ints:
        """The tokens, with HIDDEN in place of the answer."""
        return np.where(self.is_answer, HIDDEN, self.tokens)

    @property
    def answer(self) -> Ints:
        """The tokens [A] of the answer, or [E, A]."""
        return self.answer_in(self.tokens)

    def answer_in(self, tokens: Ints) -> Ints:
        """What stands in other `tokens`, of the shape of its own, where its answer stands: [A] or [E, A]."""
        return tokens[self.is_answer].reshape(*tokens.shape[:-1], -1)


def _philox_key(key: str) -> NDArray[np.uint64]:
    return np.frombuffer(blake2b(key.encode(), digest_size=16).digest(), "<u8").astype(np.uint64)


def below(raw: NDArray[np.uint64], limit: int) -> Ints:
    """Whole numbers from 0 to `limit` − 1, one from each raw number."""
    return (raw % np.uint64(limit)).astype(np.int64)


def first_draws(keys: Sequence[str], count: int) -> NDArray[np.uint64]:
    """The first `count` raw numbers of the `Draws` of each key, [len(keys), count], without making each of these."""
    bits = np.random.Philox(key=0)
    state: Any = bits.state
    found = np.empty((len(keys), count), np.uint64)
    for row, key in enumerate(keys):
        state["state"]["key"] = _philox_key(key)
        bits.state = state
        found[row] = bits.random_raw(count)
    return found


class Draws:
    """Random numbers that `key` alone decides, whatever the process, the machine and the version of NumPy.

    They are the raw numbers of Philox, whose stream NumPy guarantees; the methods of its `Generator` may change.
    """

    def __init__(self, key: str) -> None:
        self._bits = np.random.Philox(key=_philox_key(key))

    def below(self, limit: int, count: int) -> Ints:
        """`count` whole numbers from 0 to `limit` − 1, which may repeat."""
        return below(self._bits.random_raw(count), limit)

    def one_of(self, numbers: Range) -> int:
        """A number of a range."""
        return numbers.least + int(self.below(numbers.most - numbers.least + 1, 1)[0])

    def shares(self, count: int) -> NDArray[np.float64]:
        """`count` numbers above 0 and at most 1."""
        return (self.below(2**53, count) + 1) / 2**53

    def distinct(self, limit: int, count: int) -> Ints:
        """`count` different whole numbers from 0 to `limit` − 1, in random order."""
        if 4 * count > limit:
            return np.argsort(self._bits.random_raw(limit), kind="stable")[:count]
        found = np.empty(0, np.int64)
        while len(found) < count:
            drawn = np.concatenate([found, self.below(limit, count)])
            found = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
        return found[:count]


class Task(BaseModel, ABC):
    """A task with its parameters, which are its fields. `registered` is its name in `TASKS`.

    The symbols are the tokens from 0 to `vocab` − 1, and WORDS follow them. The loss and the score are those of the
    answers alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    registered: ClassVar[str]
    length: Length
    vocab: Symbols

    @cached_property
    def spec(self) -> str:
        """What `--data` takes, with the parameters that are not their defaults.

        It tells the task from others in a checkpoint, where it must stay the same when a parameter is added.
        """
        return self.spec_of(self.model_dump(mode="json", exclude_defaults=True))

    def spec_of(self, values: Mapping[str, object]) -> str:
        """What `--data` takes, with these values of its parameters."""
        return f"{PREFIX}{self.registered}" + "?" * bool(values) + "&".join(f"{n}={v}" for n, v in values.items())

    @property
    def description(self) -> str:
        """The task and its parameters, for a person."""
        values = self.model_dump(mode="json")
        return f"{PREFIX}{self.registered}, " + ", ".join(f"{name} {value}" for name, value in values.items())

    def word(self, name: str) -> int:
        """The token of one of WORDS."""
        return self.vocab + WORDS.index(name)

    def example(self, part: Part, seed: int, index: int) -> Example:
        """Example `index` of a seed. No example of one part is drawn as one of the other."""
        draws = Draws(self.key(part, seed, index))
        return self.draw(draws.one_of(self.length), draws)

    def key(self, part: Part, seed: int, index: int) -> str:
        """What decides the random numbers of an example."""
        return f"{self.registered}/{part}/{seed}/{index}"

    def rows(self, part: Part, seed: int, first: int, count: int, width: int) -> Example:
        """The examples from number `first`, padded to `width` tokens: both [count, width]."""
        tokens = np.full((count, width), self.word("<pad>"), np.int64)
        is_answer = np.zeros((count, width), bool)
        for row in range(count):
            example = self.example(part, seed, first + row)
            tokens[row, : len(example.tokens)] = example.tokens
            is_answer[row, : len(example.tokens)] = example.is_answer
        return Example(tokens, is_answer)

    @abstractmethod
    def draw(self, length: int, draws: Draws) -> Example:
        """An example of that length. Those of one length have the same number of tokens, and answers in it."""

    @abstractmethod
    def tokens_of(self, length: int) -> int:
        """The number of tokens of an example of that length."""

    @abstractmethod
    def solve(self, hidden: Ints) -> Ints:
        """The tokens [N] of an example, from those with HIDDEN in place of the answer."""


def joined(prompt: list[Any], answer: list[Any]) -> Example:
    """An example that ends with its answer. Its parts are tokens, and arrays of tokens."""
    parts = [np.atleast_1d(np.asarray(part, np.int64)) for part in (*prompt, *answer)]
    tokens = np.concatenate(parts)
    prompt_tokens = sum(len(part) for part in parts[: len(prompt)])
    return Example(tokens, np.arange(len(tokens)) >= prompt_tokens)


def filled_in(hidden: Ints, answer: list[Any]) -> Ints:
    """The tokens [N] with the parts of `answer` in place of HIDDEN."""
    tokens = hidden.copy()
    tokens[hidden == HIDDEN] = np.concatenate([np.atleast_1d(np.asarray(part, np.int64)) for part in answer])
    return tokens
