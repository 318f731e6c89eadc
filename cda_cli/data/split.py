"""Decides which text is held out. A single document is cut. Of several, each goes to one side, by a hash of its text.

The hash makes the side independent of the order and of the other documents, and puts identical copies on one side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, TypeVar

from cda_cli.data.documents import Documents
from cda_cli.data.sources import Source
from cda_cli.data.tokenizers import utf8
from cda_cli.settings import Side

HASH_BITS = 64

T = TypeVar("T")


class Rule(Protocol):
    """Places a document."""

    def place(self, text: str) -> Iterator[tuple[Side, str, bool]]:
        """Parts of `text`, in order: the side, the part, and whether the document ends with it."""


Pass = tuple[Documents, Rule]


@dataclass
class HashRule:
    """Holds out a document if its hash, of HASH_BITS, is below `threshold`. It remembers the hashes that it saw."""

    threshold: int
    lowest: int | None = None
    highest: int | None = None

    @classmethod
    def of_fraction(cls, fraction: float) -> HashRule:
        return cls(int(fraction * 2**HASH_BITS))

    def held_out(self, text: str) -> bool:
        digest = int.from_bytes(blake2b(utf8(text), digest_size=HASH_BITS // 8).digest(), "big")
        self.lowest = digest if self.lowest is None else min(self.lowest, digest)
        self.highest = digest if self.highest is None else max(self.highest, digest)
        return digest < self.threshold

    def place(self, text: str) -> Iterator[tuple[Side, str, bool]]:
        yield ("validation" if self.held_out(text) else "train"), text, True

    def after_one_sided(self, fraction: float) -> Rule | None:
        """Another rule, if this one has seen all documents and put them on one side; None if there are both sides.

        Few documents can all fall on one side. Then the one with the lowest hash is held out, or the one with the
        highest is kept to train on. A single document, however often it is repeated, is cut.
        """
        if self.lowest is None or self.highest is None:
            return None
        if self.lowest == self.highest:
            return CutRule(fraction)
        if self.lowest >= self.threshold:
            return HashRule(self.lowest + 1)
        if self.highest < self.threshold:
            return HashRule(self.highest)
        return None


@dataclass(frozen=True)
class CutRule:
    """Holds out the last `fraction` of a document's characters. Each side gets one at least, if there are two."""

    fraction: float

    def place(self, text: str) -> Iterator[tuple[Side, str, bool]]:
        cut = min(max(1, round(len(text) * (1 - self.fraction))), len(text) - 1)
        yield "train", text[:cut], False
        yield "validation", text[cut:], True


@dataclass(frozen=True)
class WholeRule:
    """Puts everything on one side, for data that comes split."""

    side: Side

    def place(self, text: str) -> Iterator[tuple[Side, str, bool]]:
        yield self.side, text, True


def in_sides(source: Source, fraction: float, work: Callable[[list[Pass]], T]) -> T:
    """What `work` returns of the documents of `source`, each with the rule that splits them.

    `work` must place every document. It runs a second time if the first rule put all documents on one side.
    """
    if source.validation is not None:
        return work([(source.training, WholeRule("train")), (source.validation, WholeRule("validation"))])
    if source.single:
        return work([(source.training, CutRule(fraction))])
    rule = HashRule.of_fraction(fraction)
    result = work([(source.training, rule)])
    other = rule.after_one_sided(fraction)
    return result if other is None else work([(source.training, other)])
