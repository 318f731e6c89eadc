"""Tells one text from another by a digest of the files as they lie on the disk, cheap on large ones.

Files of WHOLE_BYTES or less in all are read whole. Of larger ones the digest takes the size, and chunks that are spread
evenly over the file, the first and the last bytes among them. It does not notice an edit that keeps the size and falls
between the chunks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

WHOLE_BYTES = 64 << 20
CHUNK_BYTES = 64 << 10
READ_BYTES = 1 << 20
FEWEST_CHUNKS = 4


def digest(*parts: Any) -> str:
    """A short fingerprint of plain values."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def content_digest(paths: Sequence[Path], sizes: Sequence[int]) -> str:
    """A digest of the content of files in their order, whatever their names and places. Raises OSError."""
    if sum(sizes) <= WHOLE_BYTES:
        return digest([_digest_of(path, [(0, size)]) for path, size in zip(paths, sizes, strict=True)])
    share = max(FEWEST_CHUNKS, WHOLE_BYTES // CHUNK_BYTES // len(paths))
    return digest([(size, _digest_of(path, _chunks(size, share))) for path, size in zip(paths, sizes, strict=True)])


def stats(paths: Sequence[Path]) -> list[Any]:
    """What a file system changes when a file is edited or replaced, even if its size and time are set back."""
    found = [(str(path), path.stat()) for path in paths]
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in found]


def _chunks(size: int, count: int) -> list[tuple[int, int]]:
    """The place and length of `count` chunks of a file, or of the whole file."""
    if size <= count * CHUNK_BYTES:
        return [(0, size)]
    return [(index * (size - CHUNK_BYTES) // (count - 1), CHUNK_BYTES) for index in range(count)]


def _digest_of(path: Path, chunks: Sequence[tuple[int, int]]) -> str:
    found = blake2b(digest_size=16)
    with path.open("rb") as file:
        for place, length in chunks:
            file.seek(place)
            while length and (part := file.read(min(length, READ_BYTES))):
                found.update(part)
                length -= len(part)
    return found.hexdigest()
