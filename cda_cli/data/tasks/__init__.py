"""Synthetic tasks: `--data task:NAME?PARAMETER=VALUE&…` makes examples from a seed, without any file.

base       what a task is; random numbers that a seed and an index decide
sequences  copy, reverse, sort
recall     associative recall: mqar, mqmtar
search     needle, induction
"""

from __future__ import annotations

from urllib.parse import parse_qsl

from pydantic import ValidationError

from cda_cli.data.tasks.base import PREFIX, WORDS, Example, Part, Task
from cda_cli.data.tasks.recall import Mqar, Mqmtar
from cda_cli.data.tasks.search import Induction, Needle
from cda_cli.data.tasks.sequences import Copy, Reverse, Sort
from cda_cli.errors import DataError, did_you_mean, requirement

__all__ = [
    "PREFIX",
    "TASKS",
    "WORDS",
    "Example",
    "Part",
    "Task",
    "is_task",
    "parse_task",
    "task_of_length",
]

TASKS: dict[str, type[Task]] = {
    task.registered: task for task in (Copy, Reverse, Sort, Mqar, Mqmtar, Needle, Induction)
}


def is_task(source: str) -> bool:
    """Whether `--data` names a task."""
    return source.startswith(PREFIX)


def parse_task(source: str, known: Task | None = None) -> Task:
    """The task that `source` names, such as task:sort?length=32..64&vocab=32.

    What it leaves out is as in `known`: all parameters if that is the same task, and otherwise the symbols. Raises
    DataError for a task that there is not, and for parameters that it does not have or that do not fit.
    """
    name, _, query = source.removeprefix(PREFIX).partition("?")
    if name not in TASKS:
        raise DataError(f"there is no task {name!r}: {did_you_mean(name, TASKS)}")
    kind = TASKS[name]
    given: dict[str, str] = {}
    for parameter, value in parse_qsl(query, keep_blank_values=True):
        if parameter not in kind.model_fields:
            raise DataError(
                f"{PREFIX}{name} has no parameter {parameter!r}: {did_you_mean(parameter, kind.model_fields)}"
            )
        if parameter in given:
            raise DataError(f"{source} gives {parameter} twice; give it once")
        given[parameter] = value
    try:
        return kind.model_validate(_shared(kind, known) | given)
    except ValidationError as error:
        raise DataError(f"{source} is not possible: {_fault(error)}") from error


def _shared(kind: type[Task], known: Task | None) -> dict[str, object]:
    """The parameters that a task of a kind has from `known`."""
    if known is None:
        return {}
    return known.model_dump() if type(known) is kind else {"vocab": known.vocab}


def task_of_length(task: Task, length: int) -> Task:
    """The task with examples of one length. Raises DataError if it has none."""
    try:
        return type(task).model_validate(task.model_dump() | {"length": length})
    except ValidationError as error:
        raise DataError(f"{PREFIX}{task.registered} has no example of length {length}: {_fault(error)}") from error


def _fault(error: ValidationError) -> str:
    """The first fault that pydantic found."""
    fault = error.errors()[0]
    where = "".join(f"{part}: " for part in fault["loc"][:1])
    return where + requirement(fault["msg"])
