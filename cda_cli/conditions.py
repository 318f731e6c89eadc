"""Conditions on the metrics of a result, such as `top[32].difference_hi > 0.01`, under which a check fails."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cda_cli.errors import CheckFailedError, ConfigError, did_you_mean

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
SIDE = "((?:[^\\s<>=!]|(?<![<>=!])=(?!=))+)"  # A name may have a single =, as task:sort?length=64 has.
CONDITION = re.compile(rf"\s*{SIDE}\s*({'|'.join(COMPARISONS)})\s*{SIDE}\s*")


@dataclass(frozen=True)
class Condition:
    """Compares two sides, each a number or the name of a metric, by one of COMPARISONS."""

    text: str
    left: float | str
    comparison: str
    right: float | str

    def holds(self, metrics: Mapping[str, float]) -> bool:
        """Says whether it holds. Raises ConfigError if a metric is unknown, and CheckFailedError if one is NaN."""
        sides = [self._value(side, metrics) for side in (self.left, self.right)]
        return COMPARISONS[self.comparison](*sides)

    def _value(self, side: float | str, metrics: Mapping[str, float]) -> float:
        if not isinstance(side, str):
            return side
        if side not in metrics:
            near = did_you_mean(side, metrics, otherwise="name a number of --json by its path")
            raise ConfigError(f"{self.text!r} names {side}, which the result does not have: {near}")
        if math.isnan(metrics[side]):
            raise CheckFailedError(f"{side} has no value here, so {self.text!r} cannot be checked; take more text")
        return metrics[side]


def parse_condition(text: str) -> Condition:
    """Reads a condition. Raises ConfigError for what is none."""
    found = CONDITION.fullmatch(text)
    sides = [_side(side) for side in found.group(1, 3)] if found else []
    if found is None or not any(isinstance(side, str) for side in sides):
        raise ConfigError(f"{text!r} is no condition; write a metric, < or >, and a number, as in 'loss > 2'")
    return Condition(text.strip(), sides[0], found[2], sides[1])


def _side(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def metrics_of(document: Mapping[str, Any]) -> dict[str, float]:
    """Names each number of a JSON document by its path, such as "loss" or "feed_forward[0].units".

    An element of a list that has a "name" is called by that: "top[32].difference". The ends of an interval, such as
    "loss_interval", are "loss_lo" and "loss_hi". A null is NaN.
    """
    return dict(_metrics(document, ""))


def _metrics(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _members(inner, path, key)
    elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        yield path, math.nan if value is None else float(value)


def _members(value: Any, path: str, key: str) -> Iterator[tuple[str, float]]:
    before = f"{path}." if path else ""
    if not isinstance(value, (list, tuple)):
        yield from _metrics(value, before + key)
    elif key.endswith("_interval"):
        for end, inner in zip(("lo", "hi"), value, strict=True):
            yield from _metrics(inner, f"{before}{key.removesuffix('interval')}{end}")
    else:
        for index, inner in enumerate(value):
            name = inner.get("name") if isinstance(inner, Mapping) else None
            yield from _metrics(inner, before + (name or f"{key}[{index}]"))


def check_conditions(conditions: Sequence[Condition], document: Mapping[str, Any]) -> None:
    """Raises CheckFailedError, which exits with 3, if one of the conditions holds for the metrics of `document`."""
    metrics = metrics_of(document)
    held = [condition for condition in conditions if condition.holds(metrics)]
    if held:
        raise CheckFailedError(f"failed, as {' and '.join(one.text for one in held)}: {_values(held, metrics)}")


def require(condition: Condition, document: Mapping[str, Any]) -> None:
    """Raises CheckFailedError if the condition does not hold for the metrics of `document`."""
    metrics = metrics_of(document)
    if not condition.holds(metrics):
        raise CheckFailedError(f"{condition.text} does not hold: {_values([condition], metrics)}")


def _values(conditions: Sequence[Condition], metrics: Mapping[str, float]) -> str:
    """The values of the metrics that these conditions name."""
    named = {side: metrics[side] for one in conditions for side in (one.left, one.right) if isinstance(side, str)}
    return ", ".join(f"{name} is {value:.6g}" for name, value in named.items())
