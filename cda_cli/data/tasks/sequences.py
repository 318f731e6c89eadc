"""Copy, reverse and sort: a random sequence of symbols, and an answer of the same length."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from cda_cli.data.tasks.base import Draws, Example, Ints, Length, Range, Symbols, Task, filled_in, joined


class Sequence(Task):
    """A task whose answer is a sequence of the length of the prompt."""

    length: Annotated[Length, Field(description="Symbols of the sequence.")] = Range(32, 64)
    vocab: Symbols = 32

    @abstractmethod
    def answer(self, sequence: Ints) -> Ints:
        """The answer to a sequence of symbols."""

    def draw(self, length: int, draws: Draws) -> Example:
        sequence = draws.below(self.vocab, length)
        prompt = [self.word("<bos>"), sequence, self.word("<sep>")]
        return joined(prompt, [self.answer(sequence), self.word("<eos>")])

    def tokens_of(self, length: int) -> int:
        return 2 * length + 3

    def solve(self, hidden: Ints) -> Ints:
        sequence = hidden[1 : int(np.flatnonzero(hidden == self.word("<sep>"))[0])]
        return filled_in(hidden, [self.answer(sequence), self.word("<eos>")])


class Copy(Sequence):
    """`<bos>`, a random sequence of symbols, `<sep>`, and as the answer the same sequence and `<eos>`.

    Source and settings: ASEntmax (arXiv 2506.16640, and the folder synthetic of deep-spin/asentmax), which trains on
    lengths from 32 to 64 and evaluates longer ones.
    """

    registered: ClassVar[str] = "copy"

    def answer(self, sequence: Ints) -> Ints:
        return sequence


class Reverse(Sequence):
    """As copy, with the sequence from its end to its beginning."""

    registered: ClassVar[str] = "reverse"

    def answer(self, sequence: Ints) -> Ints:
        return sequence[::-1]


class Sort(Sequence):
    """As copy, with the symbols in ascending order."""

    registered: ClassVar[str] = "sort"

    def answer(self, sequence: Ints) -> Ints:
        return np.sort(sequence)
