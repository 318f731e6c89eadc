"""Rows of kept weights as bytes, and back. docs/inspection.md ("The store of rows") has the layout.

Shapes: Q queries, N kept keys of all of them together, row after row and from the nearest key to the farthest.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]

CAPPED_CODE = 255
OCTAVES, STEPS = 10, 254  # A code is one of 254 steps over 10 octaves of λ, so a weight is exact to 1.4 %.
SMALLEST = 2.0**-OCTAVES  # A weight below so much of its row's scale has no code.
LONGEST_VARINT = 5  # bytes of 32 bits


class RowArrays(NamedTuple):
    """The rows of one head: how many keys each has, its k, its rest and its octave, [Q]; and of each kept key, [N].

    `distance` is how far the key is from its query; a null key is one of those before the first key of the window.
    `weight` is λ. A row's octave o says that its weights that are not capped are at most 2^−o, and its `rest` is what
    its other keys have, as a share of the most that it can sum to.
    """

    length: Numbers
    k: Numbers
    rest: Numbers
    octave: Numbers
    distance: Numbers
    weight: Numbers
    capped: Numbers


def encode(rows: RowArrays, smallest_k: float, largest_k: float) -> bytes:
    """Returns the stream of a head, deflated. No k lies outside `smallest_k` to `largest_k`."""
    spread = np.log2(largest_k / smallest_k)
    k_code = np.round(255 * np.log2(rows.k / smallest_k) / spread) if spread > 0 else np.zeros(len(rows.k))
    rest_code = np.round(255 * rows.rest)
    octave = np.repeat(rows.octave.astype(np.float64), rows.length)
    steps = STEPS + np.round((np.log2(rows.weight) + octave) * STEPS / OCTAVES)
    weight_code = np.where(rows.capped, CAPPED_CODE, steps.clip(0, STEPS))
    gap = np.diff(rows.distance, prepend=-1) - 1
    first = (np.cumsum(rows.length) - rows.length)[rows.length > 0]
    gap[first] = rows.distance[first]
    single = (k_code, rest_code, rows.octave)
    parts = [*(each.astype(np.uint8).tobytes() for each in single), to_varints(rows.length), to_varints(gap)]
    return deflate(b"".join([*parts, weight_code.astype(np.uint8).tobytes()]))


def decode(stream: bytes, queries: int, keys: int, smallest_k: float, largest_k: float) -> RowArrays:
    """Returns what `encode` got, to the steps of the codes, of `queries` queries that see up to `keys` keys.

    Raises ValueError for a damaged stream.
    """
    most = queries * (3 + LONGEST_VARINT + keys * (1 + LONGEST_VARINT))
    content = np.frombuffer(inflate(stream, most), np.uint8)
    if len(content) < 4 * queries:
        raise ValueError("the stream is too short")
    k_code, rest_code, octave = content[: 3 * queries].reshape(3, queries).astype(np.float64)
    content = content[3 * queries :]
    length, used = from_varints(content, queries)
    content, kept = content[used:], int(length.sum())
    gap, used = from_varints(content, kept)
    code = content[used:]
    if len(code) != kept:
        raise ValueError(f"{kept} weights were announced, and {len(code)} are there")
    # Sums of gaps run on through all rows; what was there before a row begins is taken off it.
    place, starts = np.cumsum(gap + 1), np.cumsum(length) - length
    before = np.concatenate([[0], place])[starts]
    distance = place - np.repeat(before, length) - 1
    exponent = (code.astype(np.float64) - STEPS) * OCTAVES / STEPS - np.repeat(octave, length)
    capped = code == CAPPED_CODE
    weight = np.where(capped, 1.0, 2.0**exponent)
    k = smallest_k * (largest_k / smallest_k) ** (k_code / 255)
    return RowArrays(length, k, rest_code / 255, octave, distance, weight, capped)


def to_varints(numbers: Numbers) -> bytes:
    """Whole numbers below 2³², as LEB128: seven bits a byte, the lowest first, and 128 on each byte but the last."""
    rest = numbers.astype(np.uint32)
    lengths = np.sum([rest >= 1 << 7 * more for more in range(LONGEST_VARINT)], 0).clip(min=1)
    starts = np.cumsum(lengths) - lengths
    out = np.zeros(int(lengths.sum()), np.uint8)
    for place in range(LONGEST_VARINT):
        there = lengths > place
        follows = np.where(lengths[there] > place + 1, 128, 0)
        out[starts[there] + place] = rest[there] >> 7 * place & 127 | follows
    return out.tobytes()


def from_varints(content: Numbers, count: int) -> tuple[Numbers, int]:
    """Reads `count` numbers from the beginning of bytes, int64, and says how many bytes they took."""
    if not count:
        return np.empty(0, np.int64), 0
    ends = np.flatnonzero(content < 128)[:count]
    if len(ends) < count:
        raise ValueError(f"{count} numbers were announced, and {len(ends)} are there")
    starts = np.concatenate([[0], ends[:-1] + 1])
    used = int(ends[-1]) + 1
    place = np.arange(used) - np.repeat(starts, ends - starts + 1)
    if place.max() >= LONGEST_VARINT:
        raise ValueError("a number has too many bytes")
    return np.add.reduceat((content[:used] & 127).astype(np.int64) << 7 * place, starts), used


def deflate(content: bytes) -> bytes:
    """Raw deflate, without a header, as the browsers' DecompressionStream("deflate-raw") reads it."""
    # Codes of weights repeat by chance alone, and zlib finds more by Huffman codes than by what came before.
    packer = zlib.compressobj(5, wbits=-15, strategy=zlib.Z_FILTERED)
    return packer.compress(content) + packer.flush()


def inflate(stream: bytes, most: int) -> bytes:
    """Undoes `deflate`. Raises ValueError for a damaged stream, and for one of more than `most` bytes."""
    unpacker = zlib.decompressobj(wbits=-15)
    try:
        content = unpacker.decompress(stream, most)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not unpacker.eof:
        raise ValueError("a stream has another length than it should")
    return content
