"""Copy, reverse and sort: a random sequence of symbols, and an answer of the same length."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from cda_cli.data.tasks.base import (
    Draws,
    Example,
    Ints,
    Length,
    Part,
    Range,
    Symbols,
    Task,
    below,
    filled_in,
    first_draws,
    joined,
)


class Sequence(Task):
    """A task whose answer is a sequence of the length of the prompt."""

    length: Annotated[Length, Field(description="Symbols of the sequence.")] = Range(32, 64)
    vocab: Symbols = 32

    @abstractmethod
    def answers(self, sequences: Ints, lengths: Ints) -> Ints:
        """The answer to each sequence of symbols, [E, L], of which the first `lengths` [E] are given: both padded."""

    def answer(self, sequence: Ints) -> Ints:
        """The answer to a sequence of symbols."""
        return self.answers(sequence[None], np.array([len(sequence)]))[0]

    def draw(self, length: int, draws: Draws) -> Example:
        sequence = draws.below(self.vocab, length)
        prompt = [self.word("<bos>"), sequence, self.word("<sep>")]
        return joined(prompt, [self.answer(sequence), self.word("<eos>")])

    def rows(self, part: Part, seed: int, first: int, count: int, width: int) -> Example:
        """What the rows of `draw` would be, made all at once: a small model trains faster than these are made."""
        most = self.length.most
        raw = first_draws([self.key(part, seed, index) for index in range(first, first + count)], 1 + most)
        lengths = self.length.least + below(raw[:, 0], most - self.length.least + 1)
        row, place = np.nonzero(np.arange(most) < lengths[:, None])
        sequences = below(raw[:, 1:], self.vocab)
        tokens = np.full((count, width), self.word("<pad>"), np.int64)
        tokens[:, 0] = self.word("<bos>")
        tokens[row, 1 + place] = sequences[row, place]
        each = np.arange(count)
        tokens[each, 1 + lengths] = self.word("<sep>")
        tokens[row, 2 + lengths[row] + place] = self.answers(sequences, lengths)[row, place]
        tokens[each, 2 + 2 * lengths] = self.word("<eos>")
        behind = np.arange(width) - 2 - lengths[:, None]
        return Example(tokens, (behind >= 0) & (behind <= lengths[:, None]))

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

    def answers(self, sequences: Ints, lengths: Ints) -> Ints:
        return sequences


class Reverse(Sequence):
    """As copy, with the sequence from its end to its beginning."""

    registered: ClassVar[str] = "reverse"

    def answers(self, sequences: Ints, lengths: Ints) -> Ints:
        mirrored = lengths[:, None] - 1 - np.arange(sequences.shape[1])
        return np.take_along_axis(sequences, mirrored.clip(0), 1)


class Sort(Sequence):
    """As copy, with the symbols in ascending order."""

    registered: ClassVar[str] = "sort"

    def answers(self, sequences: Ints, lengths: Ints) -> Ints:
        is_padding = np.arange(sequences.shape[1]) >= lengths[:, None]
        return np.sort(np.where(is_padding, self.vocab, sequences), axis=1)
