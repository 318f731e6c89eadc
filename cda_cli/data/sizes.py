"""Offsets → the bytes of text that each token stands for.

A token stands for the characters between its offsets in its text, as UTF-8. If several tokens share a character (one
that is spelled in bytes, or ﬁ read as f and i), they share its bytes in proportion to their lengths, so a token of two
bytes counts two. Text outside all offsets belongs to no token.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Sizes = NDArray[np.uint16]
LARGEST = 2**16 - 1


def sizes_of_tokens(text: str, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> Sizes:
    """The bytes [N] of the tokens of `text` at `offsets` [N, 2], in characters. Their `lengths` [N] are 1 or more.

    A token of more than LARGEST bytes, which only a normaliser can make, counts LARGEST.
    """
    places = _places(text)
    starts, ends = offsets[:, 0], offsets[:, 1]
    reached = np.maximum.accumulate(ends)
    before = np.concatenate((np.zeros(1, np.int64), reached[:-1]))
    sizes = places[reached] - places[np.maximum(starts, before)]
    shares = (starts < before) & (starts < ends)  # a character with the token before
    if shares.any():
        sizes = _split(sizes, lengths, ~shares)
    return np.minimum(sizes, LARGEST).astype(np.uint16)


def _places(text: str) -> NDArray[np.int64]:
    """The places in UTF-8 at which each character of `text` begins, and at which the last one ends."""
    if text.isascii():
        return np.arange(len(text) + 1)
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (points > 0x7F) + (points > 0x7FF).astype(np.int64) + (points > 0xFFFF)
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(widths)))


def _split(sizes: NDArray[np.int64], lengths: NDArray[np.int64], begins: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The bytes of each group of tokens, in proportion to their lengths; `begins` says which tokens begin a group."""
    first, group = np.flatnonzero(begins), np.cumsum(begins) - 1
    whole, length = np.add.reduceat(sizes, first)[group], np.add.reduceat(lengths, first)[group]
    after = np.cumsum(lengths)
    start = (after - lengths)[first][group]
    split: NDArray[np.int64] = whole * (after - start) // length - whole * (after - lengths - start) // length
    return split
