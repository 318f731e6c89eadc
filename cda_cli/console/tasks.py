"""Evaluation tasks: what models scored, and what `--tasks` takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from cda_cli.console.base import out, plus_minus, print_pairs, share, table
from cda_cli.console.text import note, section
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from cda_cli.evaluation.tasks import Listed, TaskResult, TaskResults


def show_tasks(found: Sequence[TaskResults]) -> None:
    """Shows what one or several checkpoints scored in the same tasks, and says where a context was cut."""
    several = len(found) > 1
    names = [f"checkpoint {number}" if several else "checkpoint" for number in range(1, len(found) + 1)]
    pairs: dict[str, str] = {}
    for number, (name, one) in enumerate(zip(names, found, strict=True), start=1):
        pairs[name] = f"{one.checkpoint}{', averaged weights' if one.averaged else ''}"
        pairs[f"results {number}" if several else "results"] = str(one.folder)
    print_pairs(out(), pairs)
    if metrics := [name for name, result in found[0].results.items() if result.length is None]:
        section(
            "Tasks, values ± standard errors",
            _metrics_table([[one.results[name] for one in found] for name in metrics], names),
        )
    if by_length := [name for name, result in found[0].results.items() if result.length is not None]:
        examples = f"{found[0].results[by_length[0]].documents:,} examples of each length"
        shown = _length_table([[one.results[name] for one in found] for name in by_length])
        section(f"Synthetic tasks, {examples}; shuffled: both shares by the answers to other examples", shown)
    for name, one in zip(names, found, strict=True):
        for result in one.results.values():
            if result.truncated:
                task = f"{result.task} ({name})" if several else result.task
                requests = counted(result.truncated, "request")
                note(f"{task}: the context of {requests} was longer than the model's, and was cut from the left")


def _metrics_table(rows: Sequence[Sequence[TaskResult]], names: Sequence[str]) -> Table:
    """A row for each metric of each task, with a value for each checkpoint."""
    values = ["value"] if len(names) == 1 else names
    made = table("task", "version", "n-shot", "documents", "metric", "filter", *values)
    for results in rows:
        first = results[0]
        shots = "–" if first.num_fewshot is None else str(first.num_fewshot)
        about = (first.task, first.version, shots, f"{first.documents:,}")
        for key in first.metrics:
            metric, _, filter_ = key.partition(",")
            if not metric.endswith("_stderr"):
                made.add_row(*about, metric, filter_, *(_value(result, metric, filter_) for result in results))
                about = ("", "", "", "")
    return made


def _value(result: TaskResult, metric: str, filter_: str) -> str:
    """A metric and its standard error."""
    value, error = (result.metrics.get(f"{metric}{suffix},{filter_}") for suffix in ("", "_stderr"))
    return "–" if value is None else plus_minus(value, math.nan if error is None else error)


def _length_table(rows: Sequence[Sequence[TaskResult]]) -> Table:
    """A row for each length of each task, and for each checkpoint."""
    number = ["checkpoint"] if len(rows[0]) > 1 else []
    scores = ["exact\nmatch", "95 % interval", "token accuracy\n± standard error", "solver", "shuffled"]
    made = table("task", "length", *number, *scores)
    made.columns[0].overflow = "fold"  # The parameters of a task are in its name.
    for results in rows:
        for checkpoint, one in enumerate(results, start=1):
            exact, low, high, tokens, error, solver, shuffled, shuffled_tokens = (
                "–" if (value := one.metrics[f"{name},none"]) is None else share(value)
                for name in (
                    "exact_match", "exact_match_lo", "exact_match_hi", "token_accuracy", "token_accuracy_stderr",
                    "solver_exact_match", "shuffled_exact_match", "shuffled_token_accuracy",
                )
            )  # fmt: skip
            about = [one.task, f"{one.length:,}", *([str(checkpoint)] if number else [])]
            made.add_row(
                *about, exact, f"{low} to {high}", f"{tokens} ± {error}", solver, f"{shuffled} / {shuffled_tokens}"
            )
    return made


def show_task_list(listed: Sequence[Listed]) -> None:
    """Shows a line for each name. There are thousands, so it is no table of rich, which would take long."""
    console = out()
    width = max(len(one.name) for one in listed)
    lines = (f"{one.name:{width}}  {one.kind:9}  {one.output_type or ''}".rstrip() for one in listed)
    console.print("\n".join(lines), soft_wrap=True)
