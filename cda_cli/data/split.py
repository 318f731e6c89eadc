"""Which text is held out. Several documents: each goes to a side whole, by a hash of its own content. One: it is cut.

The hash makes the side independent of the order and of the other documents, and puts identical copies on one side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from cda_cli.data.tokenizers import utf8
from cda_cli.settings import Side

HASH_BITS = 64


class Rule(Protocol):
    """Places a document."""

    def place(self, text: str) -> Iterator[tuple[Side, str, bool]]:
        """Parts of `text`, in order: the side, the part, and whether the document ends with it."""


@dataclass
class HashRule:
    """A document is held out where its hash, of HASH_BITS, is below `threshold`. Remembers the hashes that it saw."""

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
        """The rule for documents that this one, having seen them all, put on one side; None where there were both.

        Few documents can all fall on one side; the one with the lowest hash is then held out, or the one with the
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
    """The last `fraction` of a document's characters is held out; each side has one at least, where there are two."""

    fraction: float

    def place(self, text: str) -> Iterator[tuple[Side, str, bool]]:
        cut = min(max(1, round(len(text) * (1 - self.fraction))), len(text) - 1)
        yield "train", text[:cut], False
        yield "validation", text[cut:], True


@dataclass(frozen=True)
class WholeRule:
    """Everything to one side: the data came split."""

    side: Side

    def place(self, text: str) -> Iterator[tuple[Side, str, bool]]:
        yield self.side, text, True
