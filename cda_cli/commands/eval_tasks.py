"""`cda eval --tasks`: its options, and what it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from cda_cli.errors import UsageError

LIST = "list"
PANEL = "Tasks"
# The parameters of `cda eval` that say something with --tasks and without.
OF_BOTH = {"checkpoints", "best", "ema", "batch_size", "device", "dtype", "backend", "as_json"}

TasksOption = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAME,…",
        help="Tasks of lm-evaluation-harness by name, group, tag or YAML file, or core:DIR for those of a CORE folder, "
        "in place of a text; `list` lists the names.",
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
    typer.Option("--limit", min=1, help="Most documents of each task.", rich_help_panel=PANEL),
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


def check_options(ctx: typer.Context, tasks: str | None, checkpoints: Sequence[Path]) -> None:
    """Raises UsageError for an option that says nothing here: of tasks without --tasks, or of a text with it.

    So it does for several checkpoints with --tasks.
    """
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name or "")
        if source is None or source.name != "COMMANDLINE" or option.name in OF_BOTH:
            continue
        of_tasks = getattr(option, "rich_help_panel", None) == PANEL
        if of_tasks and tasks is None:
            raise UsageError(f"{option.opts[0]} is about tasks; name them with --tasks, or leave it out")
        if not of_tasks and tasks is not None:
            raise UsageError(f"{option.opts[0]} is about a text, and --tasks brings its own; leave one of them out")
    if tasks is not None and len(checkpoints) > 1:
        raise UsageError(f"--tasks takes one checkpoint, not {len(checkpoints)}; evaluate them one after another")


def evaluate_on_tasks(
    checkpoint: Path,
    tasks: str,
    include: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    results: Path | None,
    *,
    batch_size: int,
    as_json: bool,
    best: bool,
    ema: bool,
    device: str,
    dtype: str,
    backend: str,
) -> None:
    from cda_cli.console import note, print_json, progress_in_turn, show_task_list, show_tasks
    from cda_cli.evaluation.tasks import Scorer, evaluate_tasks, find_tasks, list_harness_tasks, results_folder
    from cda_cli.restore import restore_on
    from cda_cli.signals import StopRequest

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no task; give it a name, or `list`")
    with StopRequest() as stop:
        with stop.at_once("interrupted; nothing was evaluated"):
            if names == [LIST]:
                listed = list_harness_tasks(include)
            else:
                selection = find_tasks(names, include, num_fewshot, limit)
                restored, precision = restore_on(checkpoint, device, dtype, backend, best=best, ema=ema)
        if names == [LIST]:
            print_json({"tasks": [one._asdict() for one in listed]}) if as_json else show_task_list(listed)
            return
        folder = results or results_folder(restored)
        with progress_in_turn(quiet=as_json) as begin:
            scorer = Scorer(restored, precision, batch_size, begin)
            found = evaluate_tasks(selection, scorer, folder, stop, note)
    if as_json:
        scored = {name: vars(one) for name, one in found.items()}
        print_json({"checkpoint": str(restored.path), "results": str(folder), "tasks": scored})
    else:
        show_tasks(found, restored, folder)
