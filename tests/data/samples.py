"""Texts that the tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from cda_cli.data import Corpus

UNICODE = "naïve\r\nλ ≈ 2\r日本語\n\n🙂 tab\tend\u2028 nul\x00 bom\ufeff"
LETTERS = [f"document {letter}: {letter * 20}" for letter in "abcdefghijklmnopqrstuvwxyz"]

Prepare = Callable[..., Corpus]


def as_csv(records: Iterable[Sequence[object]]) -> bytes:
    """Every cell in quotes. `csv.writer` refuses a NUL in Python 3.10."""
    quoted = ([str(cell).replace('"', '""') for cell in record] for record in records)
    return "".join(",".join(f'"{cell}"' for cell in record) + "\r\n" for record in quoted).encode()
