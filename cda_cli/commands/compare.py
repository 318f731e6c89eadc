"""`cda compare`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from cda_cli.commands.causal_options import AsOption, CutOption, FailIfOption
from cda_cli.commands.completion import complete_checkpoint
from cda_cli.commands.eval_options import BatchSizeOption, ContextOption, MaxBatchesOption
from cda_cli.commands.options import (
    BackendOption,
    BestOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    EmaOption,
    EncodingOption,
    JsonOption,
    SplitOption,
)

RunsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN",
        help="Two to six runs. The others are compared with the first.",
        autocompletion=complete_checkpoint,
    ),
]
EvalOption = Annotated[
    bool | None,
    typer.Option(
        "--eval/--no-eval",
        help="Open the models, for their losses on one text and what they read, or read the records alone.",
        show_default="open them where all runs have a checkpoint and the text is there",
        rich_help_panel="Models",  # The second column of a switch would leave too little room for the other options.
    ),
]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write the comparison as one page without scripts.")
]


def compare(
    runs: RunsArgument,
    evaluate: EvalOption = None,
    best: BestOption = False,
    ema: EmaOption = False,
    data: DataOption = None,
    encoding: EncodingOption = None,
    split: SplitOption = None,
    context: ContextOption = None,
    max_batches: MaxBatchesOption = None,
    cut: CutOption = None,
    weights_as: AsOption = None,
    html: HtmlOption = None,
    fail_if: FailIfOption = None,
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Runs side by side: whether they compare, losses at equal tokens and at equal time, speed, memory, attention.

    Where each has a checkpoint and the text of the first is there, the newest checkpoints are evaluated on it, as by
    `cda eval`, with paired intervals, and heads that read alike are aligned. --no-eval reads the records alone.
    """
    from cda_cli.comparison.recorded import read_runs
    from cda_cli.comparison.result import check_page, result
    from cda_cli.conditions import check_conditions, parse_condition
    from cda_cli.console import comparison_page, comparison_verdict, print_json, show_comparison
    from cda_cli.errors import ConfigError
    from cda_cli.storage import write_file

    conditions = [parse_condition(text) for text in fail_if or ()]
    asked = any((evaluate, best, ema, data, encoding, split, context, max_batches, cut, weights_as))
    if asked and evaluate is False:
        raise ConfigError("--no-eval opens no model, which another option asks for; leave one of them out")
    if html:
        check_page(html)
    recorded = read_runs(runs)
    models, not_evaluated = None, "--no-eval leaves them out"
    if evaluate is not False:
        from cda_cli.causal import Wanted
        from cda_cli.comparison.models import compare_models, open_where_possible, plan_for, remarks, windows_to_read
        from cda_cli.console import note, progress, shows_progress
        from cda_cli.evaluation import Plan
        from cda_cli.restore import open_side, restore_on
        from cda_cli.signals import StopRequest

        wanted = Wanted.parse(cut or (), weights_as or (), ())
        plan = plan_for(recorded, Plan(context, batch_size=batch_size, max_batches=max_batches))
        with StopRequest() as stop:
            shown = shows_progress() and not as_json
            open_text = partial(open_side, data=data, split=split, stop=stop, show_progress=shown, encoding=encoding)
            readings, not_evaluated = open_where_possible(recorded, plan, open_text, best=best, required=asked)
            if readings:
                for remark in remarks(plan, readings):
                    note(remark)
                restore = partial(
                    restore_on, device=device, dtype=dtype, backend=backend, ema=ema, context=plan.context
                )
                with progress("comparing", windows_to_read(readings, wanted), quiet=as_json) as advance:
                    models = compare_models(plan, readings, restore, wanted, stop, advance)
    found = result(recorded, models, not_evaluated)
    document = found.as_dict() | {"verdict": comparison_verdict(found)}
    if html:
        write_file(html, comparison_page(found).encode())
    if as_json:
        print_json(document)
    else:
        show_comparison(found)
    check_conditions(conditions, document)
