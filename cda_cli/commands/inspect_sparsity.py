"""`cda inspect-sparsity`."""

from __future__ import annotations

import shlex
import sys
from itertools import product

from cda_cli.commands import inspect_options
from cda_cli.commands.causal_options import AblateOption
from cda_cli.commands.eval_options import ContextOption
from cda_cli.commands.figure_options import DEFAULT_STYLES, FiguresOption, StyleOption
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


def inspect_sparsity(
    checkpoint: CheckpointArgument,
    best: BestOption = False,
    ema: EmaOption = False,
    data: DataOption = None,
    encoding: EncodingOption = None,
    split: SplitOption = None,
    layers: inspect_options.LayersOption = None,
    heads: inspect_options.HeadsOption = None,
    by: inspect_options.ByOption = "effective_support",
    context: ContextOption = None,
    max_batches: inspect_options.WindowsOption = 16,
    causal: inspect_options.CausalOption = False,
    ablate: AblateOption = None,
    figures: FiguresOption = None,
    styles: StyleOption = None,
    html: inspect_options.HtmlOption = None,
    budget: inspect_options.BudgetOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    fail_if: inspect_options.FailIfOption = None,
    as_json: JsonOption = False,
) -> None:
    """What each layer and head selects on real text: how many keys, the budget k and caps, where they are, and units.

    A map shows one measure of all chosen heads. The heat map shows the weights of the first of them, in the first of
    the chosen layers, over the beginning of the text. --json has every measure, also by position.
    """
    from cda_cli.causal import Examination, Wanted
    from cda_cli.commands.inspect_page import checked_budget, write_report_page
    from cda_cli.conditions import check_conditions, parse_condition
    from cda_cli.console import note, print_json, progress, show_report, shows_progress
    from cda_cli.data import loss_of_text
    from cda_cli.errors import ConfigError
    from cda_cli.figures import FIGURES, gather, require_figures, write_figures
    from cda_cli.inspection import GRADIENTS, ReportWatcher, check_measure, named_metrics, parse_selection
    from cda_cli.page import PageCollector
    from cda_cli.restore import open_side, restore_on
    from cda_cli.signals import StopRequest

    check_measure(by)
    conditions = [parse_condition(text) for text in fail_if or ()]
    wanted = Wanted.parse((), (), ablate or ())
    chosen_styles = styles or DEFAULT_STYLES
    if figures:
        require_figures(figures, chosen_styles)
    elif styles:
        raise ConfigError("--figure-style is that of figures; add --figures DIR")
    page_bytes = checked_budget(html, budget)
    with StopRequest() as stop:
        restored, precision = restore_on(checkpoint, device, dtype, backend, best=best, ema=ema, context=context)
        chosen_layers = parse_selection(layers, restored.config.model.depth, "--layers")
        chosen_heads = parse_selection(heads, restored.config.model.heads, "--heads")
        text = open_side(restored, data, split, stop, shows_progress() and not as_json, encoding).in_windows_of(context)
        if remark := loss_of_text(text.sides):
            note(remark)
        if causal:
            wanted = Wanted.of_selection(restored.model)._replace(head_orders=wanted.head_orders)
        examination = Examination(causal or by in GRADIENTS, wanted)
        drawn = (chosen_layers[0], chosen_heads[0])
        shown = list(product(chosen_layers, chosen_heads))
        paged = PageCollector(restored, text, page_bytes, shown) if html else None
        collectors = (paged.rows, paged.live) if paged else ()
        watcher = ReportWatcher(restored.config.model.attn_k, drawn, *collectors)
        windows = text.batches(1, max_batches)[1] * examination.passes(restored.config.model)
        with progress("inspecting", windows, quiet=as_json) as bar:

            def advance(done: int) -> None:
                bar(done)
                stop.check("interrupted; nothing was written")

            whole = examination.run(restored, precision, watcher, lambda: text.batches(1, max_batches)[0], advance)
    assert watcher.kept is not None
    examined = whole._replace(report=whole.report.only(chosen_layers, chosen_heads))
    document = examined.document({"checkpoint": str(restored.path), "data": text.description, "split": text.split})
    # Files come first: a reader that stops early, such as head, ends the command.
    if html and paged:
        note(write_report_page(html, paged, examined, restored, text))
    if figures:
        material = gather(examined, restored, text, drawn, watcher.kept)
        with progress("drawing", len(FIGURES), quiet=as_json) as drawing:
            written = write_figures(figures, material, chosen_styles, shlex.join(["cda", *sys.argv[1:]]), drawing)
        note(written.words)
    if as_json:
        print_json(document)
    else:
        show_report(examined, restored, text, by, drawn, watcher.kept)
    check_conditions(conditions, named_metrics(document))
