"""The options of `cda eval` for tasks (docs/evaluation-tasks.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

PANEL = "Tasks"

TasksOption = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAME,…",
        help="Tasks of lm-evaluation-harness by name, group, tag or YAML file, core:DIR for those of a CORE folder, or "
        "task:NAME for a synthetic task; in place of a text. `list` lists the names.",
        rich_help_panel=PANEL,
    ),
]
LengthsOption = Annotated[
    str | None,
    typer.Option(
        "--lengths",
        metavar="N,N,…",
        help="Lengths of the examples of synthetic tasks, also beyond the context of training if positions are rotary "
        "or none; the longest of the task where not given.",
        rich_help_panel=PANEL,
    ),
]
IncludeOption = Annotated[
    Path | None,
    typer.Option(
        "--include", metavar="DIR", help="Folder of YAML files of more tasks for --tasks.", rich_help_panel=PANEL
    ),
]
FewShotOption = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot",
        min=0,
        help="Examples in front of each document of a task; the task's own number where not given.",
        rich_help_panel=PANEL,
    ),
]
LimitOption = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        help="Most documents of each task; of a synthetic task, examples of each length, 1,000 where not given.",
        rich_help_panel=PANEL,
    ),
]
ResultsOption = Annotated[
    Path | None,
    typer.Option(
        "--results",
        metavar="DIR",
        help="Folder where each task's result is kept, and is read instead of computed again; RUN/evaluations where "
        "not given.",
        rich_help_panel=PANEL,
    ),
]
