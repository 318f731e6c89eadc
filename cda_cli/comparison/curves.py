"""Losses of several runs at equal tokens and at equal time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from cda_cli.comparison.recorded import Point, RecordedRun, interpolate

Axis = Literal["tokens", "seconds"]
SHARES = (0.25, 0.5, 0.75, 1.0)  # of what the run with the least of it has


class Equal(NamedTuple):
    """The losses of all runs after as many tokens, or as many seconds, of training: `at` of them.

    NaN stands for a run that has no loss there.
    """

    at: float
    losses: list[float]
    bits_per_byte: list[float]

    @property
    def is_whole(self) -> bool:
        """Whether every run has a figure."""
        return all(map(math.isfinite, self.bits_per_byte))


class Curves(NamedTuple):
    """The losses of all runs in training: those of validations, or of the training text where one of the runs has too
    few validations.

    `tokens` and `seconds` compare them at shares of the tokens and of the time of the run with the least of it; the
    last is where that run ends. They are empty where a run has no records.
    """

    kind: Literal["validation", "training"]
    points: list[Sequence[Point]]
    tokens: list[Equal]
    seconds: list[Equal]

    def equal(self, axis: Axis) -> list[Equal]:
        return self.tokens if axis == "tokens" else self.seconds

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "curves": [
                {name: [getattr(point, name) for point in points] for name in Point._fields} for points in self.points
            ],
            "equal_tokens": [each._asdict() for each in self.tokens],
            "equal_seconds": [each._asdict() for each in self.seconds],
        }


def curves(runs: Sequence[RecordedRun]) -> Curves:
    """Takes validations where each run has two, and one by the time that the shortest run ends."""
    axes: tuple[Axis, Axis] = ("tokens", "seconds")
    validated = [run.validation for run in runs]
    ends = [min(getattr(run, axis) for run in runs) for axis in axes]
    of_validations = all(
        len(points) > 1 and all(getattr(points[0], axis) <= end for axis, end in zip(axes, ends, strict=True))
        for points in validated
    )
    points = validated if of_validations else [run.training for run in runs]
    tokens, seconds = (_equal(points, axis) for axis in axes)
    return Curves("validation" if of_validations else "training", points, tokens, seconds)


def _equal(of_runs: Sequence[Sequence[Point]], axis: Axis) -> list[Equal]:
    ends = [getattr(points[-1], axis) if points else math.nan for points in of_runs]
    return [_at(min(ends) * share, of_runs, axis) for share in SHARES] if all(map(math.isfinite, ends)) else []


def _at(place: float, of_runs: Sequence[Sequence[Point]], axis: Axis) -> Equal:
    places = [[getattr(point, axis) for point in points] for points in of_runs]
    losses, bits = (
        [
            interpolate(place, where, [getattr(point, name) for point in points])
            for where, points in zip(places, of_runs, strict=True)
        ]
        for name in ("loss", "bits_per_byte")
    )
    return Equal(place, losses, bits)
