"""Associative recall: pairs of a key and a value, and then several keys whose values are asked for.

No filler is or makes a key of its example. (In Zoology's generator a random filler may repeat a key, and then nothing
tells it from a query: HazyResearch/zoology, issue 29.)
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field, model_validator

from cda_cli.data.tasks.base import (
    HIDDEN,
    Draws,
    Example,
    Ints,
    Length,
    Range,
    Symbols,
    Task,
    filled_in,
    joined,
)

Density = Annotated[float, Field(description="Share of the length that the pairs take.", gt=0, le=1)]


class Mqar(Task):
    """Multi-query associative recall: the value of a key stands behind it, and behind its second occurrence too.

    The pairs come first. Each key is asked for once behind them, most often soon: a gap of g places has a weight of
    g^(power − 1). Random symbols that are no key of the example fill the rest. The first half of the symbols are keys,
    and the second are values. Source: Arora et al., Zoology (arXiv 2312.04927), figure 2
    and its generator; there a filler stands in place of the value behind the second occurrence, which is the target.
    """

    registered: ClassVar[str] = "mqar"
    length: Annotated[Length, Field(description="All tokens.")] = Range(64, 64)
    vocab: Symbols = 8192
    density: Density = 0.125
    power: Annotated[float, Field(description="How evenly the gaps before a query spread; 1: evenly.", gt=0)] = 0.01

    def pairs(self, length: int) -> int:
        """The number of pairs in an example of that length."""
        return int(length * self.density / 2 + 1e-9)

    @model_validator(mode="after")
    def _fits(self) -> Mqar:
        least, most = self.pairs(self.length.least), self.pairs(self.length.most)
        if not least:
            raise ValueError(
                f"a length of {self.length.least} has no pair at density {self.density:g}; make one of them larger"
            )
        if self.density > 0.5:
            raise ValueError(f"density {self.density:g} leaves no room for the queries; make it 0.5 or less")
        if most > self.vocab // 2:
            raise ValueError(
                f"vocab {self.vocab} has too few symbols for {most} keys and {most} values; make it {2 * most} or more"
            )
        return self

    def draw(self, length: int, draws: Draws) -> Example:
        pairs = self.pairs(length)
        keys = draws.distinct(self.vocab // 2, pairs)
        values = self.vocab // 2 + draws.distinct(self.vocab - self.vocab // 2, pairs)
        tokens = self._filler(length, np.sort(keys), draws)
        tokens[: 2 * pairs] = np.stack([keys, values], 1).reshape(-1)
        asks = 2 * pairs + 2 * self._gaps((length - 2 * pairs) // 2, pairs, draws)
        tokens[asks], tokens[asks + 1] = keys, values
        is_answer = np.zeros(length, bool)
        is_answer[asks + 1] = True
        return Example(tokens, is_answer)

    def _filler(self, length: int, keys: Ints, draws: Draws) -> Ints:
        """Random symbols [length], none of the sorted `keys`: number i stands for the i-th of the others."""
        symbols = draws.below(self.vocab - len(keys), length)
        return symbols + np.searchsorted(keys - np.arange(len(keys)), symbols, side="right")

    def _gaps(self, places: int, count: int, draws: Draws) -> Ints:
        """`count` different places, drawn one after another by their weights.

        Each place gets an exponential variable with its weight as rate, and the least of these are taken (Efraimidis
        and Spirakis, Information Processing Letters 97, 2006).
        """
        rates = np.arange(1, places + 1) ** (self.power - 1)
        return np.argsort(-np.log(draws.shares(places)) / rates, kind="stable")[:count]

    def tokens_of(self, length: int) -> int:
        return length

    def solve(self, hidden: Ints) -> Ints:
        answers = np.flatnonzero(hidden == HIDDEN)
        first = [int(np.flatnonzero(hidden == key)[0]) for key in hidden[answers - 1]]
        return filled_in(hidden, [hidden[np.array(first) + 1]])


class Mqmtar(Task):
    """Multi-query multi-token associative recall: keys and values are words of several symbols, between `<space>`s.

    A pair is a key, `<value>` and a value, and lies anywhere in its equal share of the length. `<query>` and a key
    follow for each query, then `<sep>`, and as the answer `<query>` and the value for each, and `<eos>`. Keys and
    values are any of `words` words, which the parameters decide. Source and settings: ASEntmax (arXiv 2506.16640).
    """

    registered: ClassVar[str] = "mqmtar"
    length: Annotated[Length, Field(description="Tokens that hold the pairs.")] = Range(32, 64)
    vocab: Symbols = 256
    density: Density = 0.8
    queries: Annotated[int, Field(description="Queries, of which two may be alike.", ge=1)] = 4
    key_len: Annotated[int, Field(description="Symbols of a key.", ge=1, le=3)] = 2
    value_len: Annotated[int, Field(description="Symbols of a value.", ge=1, le=3)] = 2
    words: Annotated[int, Field(description="Different keys, and different values.", ge=1, le=2**20)] = 10_000

    @property
    def _pair_len(self) -> int:
        """The tokens of a pair: key, `<value>`, value and a `<space>`."""
        return self.key_len + self.value_len + 2

    def pairs(self, length: int) -> int:
        """The number of pairs in an example of that length."""
        return min(self.words, int(length * self.density / self._pair_len + 1e-9))

    @model_validator(mode="after")
    def _fits(self) -> Mqmtar:
        if not self.pairs(self.length.least):
            raise ValueError(
                f"a length of {self.length.least} has no pair at density {self.density:g}; make one of them larger"
            )
        most = self.vocab ** min(self.key_len, self.value_len)
        if self.words > most:
            raise ValueError(
                f"{self.vocab} symbols make {most} different keys and values, not {self.words}; lower words, or raise "
                "vocab, key_len or value_len"
            )
        return self

    @cached_property
    def _keys(self) -> Ints:
        return self._some_words(self.key_len, "keys")

    @cached_property
    def _values(self) -> Ints:
        return self._some_words(self.value_len, "values")

    def _some_words(self, size: int, kind: str) -> Ints:
        """Different words [words, size]. They are the same for all lengths."""
        numbers = Draws(f"{self.vocab}/{self.words}/{size}/{kind}").distinct(self.vocab**size, self.words)
        return numbers[:, None] // self.vocab ** np.arange(size) % self.vocab

    def draw(self, length: int, draws: Draws) -> Example:
        pairs = self.pairs(length)
        keys = self._keys[draws.distinct(self.words, pairs)]
        values = self._values[draws.distinct(self.words, pairs)]
        share = length // pairs
        starts = np.arange(pairs) * share + draws.below(share - self._pair_len + 1, pairs)
        text = np.full(length, self.word("<space>"))
        text[starts[:, None] + np.arange(self.key_len)] = keys
        text[starts + self.key_len] = self.word("<value>")
        text[(starts + self.key_len + 1)[:, None] + np.arange(self.value_len)] = values
        asked = draws.below(pairs, self.queries)
        prompt = [self.word("<bos>"), text, self._marked(keys[asked]), self.word("<sep>")]
        return joined(prompt, [self._marked(values[asked]), self.word("<eos>")])

    def _marked(self, words: Ints) -> Ints:
        """The words [n, size], each behind a `<query>`, in one row."""
        return np.insert(words, 0, self.word("<query>"), axis=1).reshape(-1)

    def tokens_of(self, length: int) -> int:
        return length + self.queries * (self.key_len + self.value_len + 2) + 3

    def solve(self, hidden: Ints) -> Ints:
        marks = np.flatnonzero(hidden == self.word("<value>"))
        keys, values = np.arange(-self.key_len, 0), np.arange(1, self.value_len + 1)
        known = {tuple(hidden[mark + keys]): hidden[mark + values] for mark in marks}
        asks = np.flatnonzero(hidden == self.word("<query>"))
        found = [known[tuple(hidden[ask + 1 : ask + 1 + self.key_len])] for ask in asks]
        return filled_in(hidden, [self._marked(np.stack(found)), self.word("<eos>")])
