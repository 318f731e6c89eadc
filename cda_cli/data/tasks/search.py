"""Needle and induction: what is asked for stands once in a long row of symbols, at a random place."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field, model_validator

from cda_cli.data.tasks.base import HIDDEN, Draws, Example, Ints, Length, Range, Symbols, Task, filled_in, joined


class Needle(Task):
    """The passkey behind the one `<needle>` in random symbols; `<sep> <needle>` at the end asks for it.

    Source: Mohtashami and Jaggi, Landmark Attention
    (arXiv 2305.16300), section 4.2, whose filler is a sentence.
    """

    registered: ClassVar[str] = "needle"
    length: Annotated[Length, Field(description="Tokens of the haystack, the needle in it included.")] = Range(64, 128)
    vocab: Symbols = 32
    passkey: Annotated[int, Field(description="Symbols of the passkey.", ge=1)] = 5

    @model_validator(mode="after")
    def _fits(self) -> Needle:
        if self.length.least <= self.passkey:
            raise ValueError(
                f"a passkey of {self.passkey} takes a length of {self.passkey + 1} or more, not {self.length}; make "
                "the length larger"
            )
        return self

    def draw(self, length: int, draws: Draws) -> Example:
        filler = draws.below(self.vocab, length - 1 - self.passkey)
        passkey = draws.below(self.vocab, self.passkey)
        place = int(draws.below(len(filler) + 1, 1)[0])
        ask, end = [self.word("<sep>"), self.word("<needle>")], self.word("<eos>")
        haystack = [filler[:place], self.word("<needle>"), passkey, filler[place:]]
        return joined([self.word("<bos>"), *haystack, *ask], [passkey, end])

    def tokens_of(self, length: int) -> int:
        return length + self.passkey + 4

    def solve(self, hidden: Ints) -> Ints:
        first = int(np.flatnonzero(hidden == self.word("<needle>"))[0]) + 1
        return filled_in(hidden, [hidden[first : first + self.passkey], self.word("<eos>")])


class Induction(Task):
    """The symbol behind the earlier occurrence of the last symbol, which occurred once before.

    Source: Olsson et al., In-context Learning and Induction Heads
    (arXiv 2209.11895). The settings are those of Mamba (arXiv 2312.00752, section 4.1.2), whose asking symbol is always
    the same; here any symbol may ask.
    """

    registered: ClassVar[str] = "induction"
    length: Annotated[Length, Field(description="Symbols before the answer.")] = Range(256, 256)
    vocab: Symbols = 16

    @model_validator(mode="after")
    def _fits(self) -> Induction:
        if self.length.least < 3:
            raise ValueError(f"induction takes a length of 3 or more, not {self.length}; make the length larger")
        return self

    def draw(self, length: int, draws: Draws) -> Example:
        asks, place = int(draws.below(self.vocab, 1)[0]), int(draws.below(length - 2, 1)[0])
        symbols = draws.below(self.vocab - 1, length)
        symbols += symbols >= asks  # any symbol but the one that asks
        symbols[[place, -1]] = asks
        return joined([symbols], [symbols[place + 1]])

    def tokens_of(self, length: int) -> int:
        return length + 1

    def solve(self, hidden: Ints) -> Ints:
        known = hidden[hidden != HIDDEN]
        return filled_in(hidden, [known[int(np.flatnonzero(known == known[-1])[0]) + 1]])
