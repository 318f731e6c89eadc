"""Evaluation tasks: what a model scored, and what `--tasks` takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cda_cli.console.base import out, plus_minus, print_pairs, print_trimmed, table
from cda_cli.console.text import note
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from cda_cli.evaluation.tasks import Listed, TaskResult
    from cda_cli.restore import Restored


def show_tasks(results: Mapping[str, TaskResult], restored: Restored, folder: Path) -> None:
    """Shows a row for each metric of each task, and says where a context was cut."""
    console = out()
    averaged = ", averaged weights" if restored.averaged else ""
    print_pairs(console, {"checkpoint": f"{restored.path}{averaged}", "results": str(folder)})
    console.print()
    rows = table("task", "version", "n-shot", "documents", "metric", "filter", "value")
    for result in results.values():
        shots = "–" if result.num_fewshot is None else str(result.num_fewshot)
        about = (result.task, result.version, shots, f"{result.documents:,}")
        for metric, filter_, value, error in _metrics(result):
            rows.add_row(*about, metric, filter_, "–" if value is None else plus_minus(value, error))
            about = ("", "", "", "")
    print_trimmed(console, rows)
    for result in results.values():
        if result.truncated:
            requests = counted(result.truncated, "request")
            note(f"{result.task}: the context of {requests} was longer than the model's, and was cut from the left")


def _metrics(result: TaskResult) -> list[tuple[str, str, float | None, float]]:
    """Name, filter, value and standard error of each metric; NaN where there is no standard error."""
    found = []
    for key, value in result.metrics.items():
        metric, _, filter_ = key.partition(",")
        if not metric.endswith("_stderr"):
            error = result.metrics.get(f"{metric}_stderr,{filter_}")
            found.append((metric, filter_, value, math.nan if error is None else error))
    return found


def show_task_list(listed: Sequence[Listed]) -> None:
    """Shows a line for each name. There are thousands, so it is no table of rich, which would take long."""
    console = out()
    width = max(len(one.name) for one in listed)
    lines = (f"{one.name:{width}}  {one.kind:5}  {one.output_type or ''}".rstrip() for one in listed)
    console.print("\n".join(lines), soft_wrap=True)
