"""Texts that the tests share."""

from __future__ import annotations

from collections.abc import Callable

from cda_cli.data import Corpus

UNICODE = "naïve\r\nλ ≈ 2\r日本語\n\n🙂 tab\tend\u2028 nul\x00 bom\ufeff"
LETTERS = [f"document {letter}: {letter * 20}" for letter in "abcdefghijklmnopqrstuvwxyz"]

Prepare = Callable[..., Corpus]
