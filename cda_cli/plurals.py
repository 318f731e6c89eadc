"""A number with its noun."""

from __future__ import annotations


def counted(number: int, singular: str, plural: str = "") -> str:
    """`1 thread`, `2 threads`, `1,234 threads`; `plural` where an s at the end does not make it."""
    return f"{number:,} {singular if number == 1 else plural or f'{singular}s'}"
