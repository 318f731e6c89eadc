"""`cda inspect-sparsity`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from cda_cli.commands.inspect_options import FailIfOption
from cda_cli.commands.options import (
    BackendOption,
    BestOption,
    CheckpointArgument,
    DataOption,
    DeviceOption,
    DtypeOption,
    EmaOption,
    EncodingOption,
    JsonOption,
    SplitOption,
)

if TYPE_CHECKING:
    from cda_cli.data import Batch


def inspect_sparsity(
    checkpoint: CheckpointArgument,
    best: BestOption = False,
    ema: EmaOption = False,
    data: DataOption = None,
    encoding: EncodingOption = None,
    split: SplitOption = None,
    layers: Annotated[str | None, typer.Option(help="Layers to report, such as 0,2-3; all where not given.")] = None,
    heads: Annotated[str | None, typer.Option(help="Heads to report; the first is drawn as a heat map.")] = None,
    by: Annotated[
        str, typer.Option(metavar="MEASURE", help="The measure of the map of all heads; docs/inspection.md lists them.")
    ] = "effective_support",
    max_batches: Annotated[int, typer.Option(min=1, help="Sequences of the text to look at.")] = 16,
    causal: Annotated[
        bool,
        typer.Option(
            "--causal",
            help="Also causal checks on the same text: the loss with 1, 2, 4 … keys for each query, beside that of "
            "other choices of as many, and with each row as k·softmax(s/ε).",
        ),
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    fail_if: FailIfOption = None,
    as_json: JsonOption = False,
) -> None:
    """What each layer and head selects on real text: how many keys, the budget k and caps, where they are, and units.

    A map shows one measure of all chosen heads. The heat map shows the weights of the first of them, in the first of
    the chosen layers, over the beginning of the text. --json has every measure, also by position.
    """
    from cda_cli.causal import TOLERANCE, Wanted, check_text
    from cda_cli.conditions import check_conditions, parse_condition
    from cda_cli.console import note, print_json, progress, show_report, shows_progress
    from cda_cli.data import loss_of_text
    from cda_cli.inspection import ReportWatcher, check_measure, inspect, named_figures, parse_selection
    from cda_cli.restore import open_side, restore_on
    from cda_cli.signals import StopRequest

    check_measure(by)
    conditions = [parse_condition(text) for text in fail_if or ()]
    with StopRequest() as stop:
        restored, precision = restore_on(checkpoint, device, dtype, backend, best=best, ema=ema)
        chosen_layers = parse_selection(layers, restored.config.model.depth, "--layers")
        chosen_heads = parse_selection(heads, restored.config.model.heads, "--heads")
        text = open_side(restored, data, split, stop, shows_progress() and not as_json, encoding)
        if remark := loss_of_text(text.sides):
            note(remark)
        wanted = Wanted.of_selection(restored.model) if causal else None
        drawn = (chosen_layers[0], chosen_heads[0])
        watcher, checked = ReportWatcher(restored.config.model.attn_k, keep=drawn), None
        _, windows = text.batches(1, max_batches)
        passes = 1 + (1 + wanted.passes(restored.config.model) if wanted else 0)
        with progress("inspecting", windows * passes, quiet=as_json) as bar:

            def advance(done: int) -> None:
                bar(done)
                stop.check("interrupted; nothing was written")

            def open_batches() -> Iterator[Batch]:
                return text.batches(1, max_batches)[0]

            inspect(restored.model, open_batches(), restored.device, precision, watcher, advance)
            if wanted:
                checked = check_text(
                    restored.model, wanted, open_batches, restored.device, precision, TOLERANCE, advance
                )
    report = watcher.report().only(chosen_layers, chosen_heads)
    source = {"checkpoint": str(restored.path), "data": text.description, "split": text.split}
    further = {"causal": checked.document()} if checked else {}
    document = {**source, "attn_eps": restored.model.attention_eps, **report.as_dict(), **further}
    if as_json:
        print_json(document)
    else:
        assert watcher.kept is not None
        show_report(report, restored, text, by, drawn, watcher.kept, checked)
    check_conditions(conditions, named_figures(document))
