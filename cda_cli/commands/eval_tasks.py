"""`cda eval --tasks`: what it refuses, and what it does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from cda_cli.commands.task_options import PANEL
from cda_cli.errors import UsageError

LIST = "list"
# The parameters of `cda eval` that say something with --tasks and without.
OF_BOTH = {"checkpoints", "best", "ema", "plot", "fail_if", "batch_size", "device", "dtype", "backend", "as_json"}


def check_options(ctx: typer.Context, tasks: str | None) -> None:
    """Raises UsageError for an option that says nothing here: of tasks without --tasks, or of a text with it."""
    for option in ctx.command.params:
        source = ctx.get_parameter_source(option.name or "")
        if source is None or source.name != "COMMANDLINE" or option.name in OF_BOTH:
            continue
        of_tasks = getattr(option, "rich_help_panel", None) == PANEL
        if of_tasks and tasks is None:
            raise UsageError(f"{option.opts[0]} is about tasks; name them with --tasks, or leave it out")
        if not of_tasks and tasks is not None:
            raise UsageError(f"{option.opts[0]} is about a text, and --tasks brings its own; leave one of them out")


def evaluate_on_tasks(
    checkpoints: Sequence[Path],
    tasks: str,
    lengths: str | None,
    include: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    results: Path | None,
    plot: Path | None,
    fail_if: Sequence[str],
    *,
    batch_size: int,
    as_json: bool,
    best: bool,
    ema: bool,
    device: str,
    dtype: str,
    backend: str,
) -> None:
    from cda_cli.conditions import check_conditions, parse_condition
    from cda_cli.console import note, print_json, progress_in_turn, show_task_list, show_tasks
    from cda_cli.evaluation.tasks import (
        Scorer,
        TaskOptions,
        TaskResults,
        draw_lengths,
        evaluate_tasks,
        find_tasks,
        list_tasks,
        parse_lengths,
        results_folder,
    )
    from cda_cli.plots import require_plot
    from cda_cli.restore import open_saved, own_task, restore_on
    from cda_cli.signals import StopRequest

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError("--tasks names no task; give it a name, or `list`")
    wanted = parse_lengths(lengths) if lengths is not None else ()
    conditions = [parse_condition(text) for text in fail_if]
    if plot:
        require_plot(plot)
    with StopRequest() as stop:
        with stop.at_once("interrupted; nothing was evaluated"):
            if names == [LIST]:
                listed = list_tasks(include)
            else:
                saved = [open_saved(path, best=best) for path in checkpoints]
                own = own_task(saved[0].config)
                selection = find_tasks(names, TaskOptions(include, num_fewshot, limit, wanted, own))
                for each in saved:
                    selection.check(each)
                if plot:
                    selection.require_lengths("--plot")
        if names == [LIST]:
            print_json({"tasks": [one._asdict() for one in listed]}) if as_json else show_task_list(listed)
            return
        found = []
        with progress_in_turn(quiet=as_json) as begin:
            for path in checkpoints:
                with stop.at_once("interrupted; the same command goes on from the tasks that have ended"):
                    restored, precision = restore_on(
                        path, device, dtype, backend, best=best, ema=ema, context=selection.context
                    )
                folder = results or results_folder(restored)
                scorer = Scorer(restored, precision, batch_size, begin)
                scored = evaluate_tasks(selection, scorer, folder, stop, note)
                found.append(TaskResults(restored.path, restored.averaged, folder, scored))
    documents = [one.as_dict() for one in found]
    document = documents[0] if len(documents) == 1 else {"checkpoints": documents}
    if as_json:
        print_json(document)
    else:
        show_tasks(found)
    if plot:
        draw_lengths(plot, [one.results for one in found])
    check_conditions(conditions, document)
