"""Evaluation tasks: names, as `--tasks` takes them → what a model scores in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cda_cli.data import TASKS
from cda_cli.errors import ConfigError
from cda_cli.evaluation.tasks.base import EvaluationTask, Scorer, Selection, TaskOptions, TaskResult
from cda_cli.evaluation.tasks.core import find_core_tasks
from cda_cli.evaluation.tasks.harness import Listed, find_harness_tasks, list_harness_tasks
from cda_cli.evaluation.tasks.pictures import draw_lengths
from cda_cli.evaluation.tasks.stored import TaskResults, evaluate_tasks, results_folder
from cda_cli.evaluation.tasks.synthetic import find_synthetic_tasks, parse_lengths

__all__ = [
    "EvaluationTask",
    "Listed",
    "Scorer",
    "Selection",
    "TaskOptions",
    "TaskResult",
    "TaskResults",
    "draw_lengths",
    "evaluate_tasks",
    "find_tasks",
    "list_tasks",
    "parse_lengths",
    "results_folder",
]

# What finds the tasks of a name PREFIX:REST. A name without such a prefix is one of lm-evaluation-harness.
Finder = Callable[[Sequence[str], TaskOptions], Selection]
FINDERS: dict[str, Finder] = {"core": find_core_tasks, "task": find_synthetic_tasks}


def find_tasks(names: Sequence[str], options: TaskOptions | None = None) -> Selection:
    """Finds tasks by name, with their data, in the order of the names. Raises CdaError for what is no task."""
    options = options or TaskOptions()
    by_finder: dict[Finder, list[str]] = {}
    for name in names:
        prefix, colon, rest = name.partition(":")
        finder = FINDERS.get(prefix) if colon else None
        by_finder.setdefault(finder or find_harness_tasks, []).append(rest if finder else name)
    if options.lengths and find_synthetic_tasks not in by_finder:
        raise ConfigError("--lengths is about synthetic tasks; name one with --tasks, such as task:sort")
    for option, value in {"--include": options.include, "--num-fewshot": options.num_fewshot}.items():
        if value is not None and set(by_finder) == {find_synthetic_tasks}:
            raise ConfigError(f"{option} says nothing of synthetic tasks; leave it out")
    selection = Selection()
    for finder, found in by_finder.items():
        selection.add(finder(found, options))
    return selection


def list_tasks(include: Path | None) -> list[Listed]:
    """Lists the synthetic tasks, and all that lm_eval brings and the YAML files below `include` add. Loads no data."""
    own = [Listed(f"task:{name}", "synthetic", None, None) for name in sorted(TASKS)]
    return [*own, *list_harness_tasks(include)]
