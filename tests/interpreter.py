"""Spares Triton's interpreter what it does again and again, which is two fifths of its time in these tests."""

from __future__ import annotations

import functools
from collections.abc import Callable

import triton.language as tl
from triton.runtime import interpreter


def patch_language_once_a_launch() -> None:
    """From now on a function that a kernel calls does not patch Triton's language again.

    The interpreter patches the language when it launches a kernel, and restores it at the end (`_patch_lang`, in Triton
    3.6 and 3.7). It does so again in each call within the kernel, where it looks at every name of the language and
    finds each one patched.
    """
    patch = interpreter._patch_lang

    @functools.cache
    def languages(function: Callable[..., object]) -> list[object]:
        """The modules of the language that `_patch_lang` patches for a function."""
        return [language for language in (tl, tl.core) if any(one is language for one in function.__globals__.values())]

    def patch_where_needed(function: Callable[..., object]) -> interpreter._LangPatchScope:
        found = languages(function)
        if found and not any(tl.core.is_builtin(language.load) for language in found):
            return interpreter._LangPatchScope()
        return patch(function)

    interpreter._patch_lang = patch_where_needed
