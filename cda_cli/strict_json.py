"""Writes JSON that every reader takes: a number that is not finite (the error of a single window) becomes null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(document: Mapping[str, Any], indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(_finite(document), ensure_ascii=ensure_ascii, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
