"""The picture of synthetic tasks: accuracy by length, of the model and by chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path

from cda_cli.evaluation.tasks.base import TaskResult
from cda_cli.plots import Point, plot_lines

SHARES = (-0.03, 1.03)  # of the y axis, so that lines at 0 and 1 show


def draw_lengths(path: Path, found: Sequence[Mapping[str, TaskResult]]) -> None:
    """Draws what one or several checkpoints scored in synthetic tasks into the file `path`."""
    tasks = {result.task for result in found[0].values() if result.length is not None}
    lines: dict[str, list[Point]] = {}
    for number, results in enumerate(found, start=1):
        checkpoint = [f"checkpoint {number}"] if len(found) > 1 else []
        for result in results.values():
            task = [result.task] if len(tasks) > 1 else []
            if result.length is not None:
                low, high = _metric(result, "exact_match_lo"), _metric(result, "exact_match_hi")
                exact = Point(result.length, _metric(result, "exact_match"), low, high)
                tokens = Point(result.length, _metric(result, "token_accuracy"), nan, nan)
                lines.setdefault(", ".join([*task, *checkpoint, "exact match"]), []).append(exact)
                lines.setdefault(", ".join([*task, *checkpoint, "tokens"]), []).append(tokens)
                if number == 1:  # Chance is the same for all checkpoints.
                    chance = Point(result.length, _metric(result, "shuffled_token_accuracy"), nan, nan)
                    lines.setdefault(", ".join([*task, "tokens by chance"]), []).append(chance)
    what = f"accuracy in {tasks.pop()}" if len(tasks) == 1 else "accuracy"
    plot_lines(path, lines, "length", what, limits=SHARES)


def _metric(result: TaskResult, name: str) -> float:
    value = result.metrics[f"{name},none"]
    return nan if value is None else value
