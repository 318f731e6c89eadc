"""Evaluation tasks: names, as `--tasks` takes them → what a model scores in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cda_cli.evaluation.tasks.base import EvaluationTask, Scorer, Selection, TaskResult
from cda_cli.evaluation.tasks.core import find_core_tasks
from cda_cli.evaluation.tasks.harness import Listed, find_harness_tasks, list_harness_tasks
from cda_cli.evaluation.tasks.stored import evaluate_tasks, results_folder

__all__ = [
    "EvaluationTask",
    "Listed",
    "Scorer",
    "Selection",
    "TaskResult",
    "evaluate_tasks",
    "find_tasks",
    "list_harness_tasks",
    "results_folder",
]

# What finds the tasks of a name PREFIX:REST. A name without such a prefix is one of lm-evaluation-harness.
Finder = Callable[[Sequence[str], Path | None, int | None, int | None], Selection]
FINDERS: dict[str, Finder] = {"core": find_core_tasks}


def find_tasks(
    names: Sequence[str], include: Path | None = None, num_fewshot: int | None = None, limit: int | None = None
) -> Selection:
    """Finds tasks by name, with their data, in the order of the names.

    `include` is a folder of YAML files of lm-evaluation-harness. `num_fewshot` takes the place of the number of the
    tasks, and only the first `limit` documents of each count. Raises CdaError for what is no task.
    """
    by_finder: dict[Finder, list[str]] = {}
    for name in names:
        prefix, colon, rest = name.partition(":")
        finder = FINDERS.get(prefix) if colon else None
        by_finder.setdefault(finder or find_harness_tasks, []).append(rest if finder else name)
    selection = Selection()
    for finder, found in by_finder.items():
        selection.add(finder(found, include, num_fewshot, limit))
    return selection
