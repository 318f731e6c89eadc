"""`cda eval`."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import typer

from cda_cli.commands import causal_options, eval_options, eval_tasks, options, task_options


def evaluate(
    ctx: typer.Context,
    checkpoints: eval_options.CheckpointsArgument,
    best: options.BestOption = False,
    ema: options.EmaOption = False,
    data: options.DataOption = None,
    encoding: options.EncodingOption = None,
    split: options.SplitOption = None,
    context: eval_options.ContextOption = None,
    stride: eval_options.StrideOption = None,
    per_document: eval_options.PerDocumentOption = False,
    max_batches: eval_options.MaxBatchesOption = None,
    max_documents: eval_options.MaxDocumentsOption = None,
    by_position: eval_options.ByPositionOption = False,
    calibration: eval_options.CalibrationOption = False,
    losses: eval_options.LossesOption = None,
    cut: causal_options.CutOption = None,
    weights_as: causal_options.AsOption = None,
    ablate: causal_options.AblateOption = None,
    tolerance: causal_options.ToleranceOption = None,
    plot: eval_options.PlotOption = None,
    fail_if: causal_options.FailIfOption = None,
    tasks: task_options.TasksOption = None,
    lengths: task_options.LengthsOption = None,
    include: task_options.IncludeOption = None,
    num_fewshot: task_options.FewShotOption = None,
    limit: task_options.LimitOption = None,
    results: task_options.ResultsOption = None,
    batch_size: eval_options.BatchSizeOption = 16,
    device: options.DeviceOption = "auto",
    dtype: options.DtypeOption = "auto",
    backend: options.BackendOption = "auto",
    as_json: options.JsonOption = False,
) -> None:
    """Loss, perplexity and bits per byte over a whole split, each token counted once, with standard errors; or tasks.

    Bits per byte spread the loss over the bytes of text that the tokens stand for; a separator and an unknown token
    stand for none. Several checkpoints are compared on the same windows, and in causal checks each with itself under a
    change. Intervals are those of a bootstrap, and too narrow for a few windows.
    """
    eval_tasks.check_options(ctx, tasks)
    if tasks is not None:
        how: dict[str, Any] = {"best": best, "ema": ema, "device": device, "dtype": dtype, "backend": backend}
        how |= {"batch_size": batch_size, "as_json": as_json}
        eval_tasks.evaluate_on_tasks(
            checkpoints, tasks, lengths, include, num_fewshot, limit, results, plot, fail_if or (), **how
        )
        return

    from cda_cli.causal import Checks, Wanted, draw_cuts
    from cda_cli.conditions import check_conditions, parse_condition
    from cda_cli.console import note, print_json, progress, show_effects, show_evaluation, shows_progress
    from cda_cli.data import loss_of_text
    from cda_cli.evaluation import LossesFile, Plan, evaluate_readings, open_readings
    from cda_cli.plots import require_plot
    from cda_cli.restore import open_side, restore_on
    from cda_cli.signals import StopRequest

    wanted = Wanted.parse(cut or (), weights_as or (), ablate or ())
    conditions = [parse_condition(text) for text in fail_if or ()]
    if tolerance is not None:
        wanted.require_cuts("--tolerance")
    if plot:
        wanted.require_cuts("--plot")
        require_plot(plot)
    checks = Checks(wanted)
    plan = Plan(context, stride, per_document, batch_size, max_batches, max_documents, by_position, calibration)
    with StopRequest() as stop:
        shown = shows_progress() and not as_json
        open_text = partial(open_side, data=data, split=split, stop=stop, show_progress=shown, encoding=encoding)
        readings = open_readings(checkpoints, plan, open_text, best=best)
        if remark := loss_of_text(readings[0].text.sides):
            note(remark)
        restore = partial(restore_on, device=device, dtype=dtype, backend=backend, ema=ema, context=context)
        passes = [1 + wanted.passes(reading.saved.config.model) for reading in readings]
        windows = sum(len(reading.windows) * count for reading, count in zip(readings, passes, strict=True))
        with (
            LossesFile.open(losses) if losses else nullcontext() as file,
            progress("evaluating", windows, quiet=as_json) as advance,
        ):
            result = evaluate_readings(plan, readings, restore, stop, advance, file, checks.ways)
    effects = checks.effects(result, tolerance)
    document = result.as_dict([each.as_dict() for each in effects])
    if as_json:
        print_json(document)
    else:
        show_evaluation(result, averaged=ema)
        show_effects(effects)
    if plot:
        draw_cuts(plot, effects)
    check_conditions(conditions, document)
