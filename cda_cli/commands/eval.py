"""`cda eval`."""

from __future__ import annotations

from typing import Annotated

import typer

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


def evaluate(
    checkpoint: CheckpointArgument,
    best: BestOption = False,
    ema: EmaOption = False,
    data: DataOption = None,
    encoding: EncodingOption = None,
    split: SplitOption = None,
    max_batches: Annotated[int | None, typer.Option(min=1, help="Most batches to evaluate.")] = None,
    cut: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CHOICE:N,N",
            help="Also with only N keys for each query: top (the largest weights), or as controls recent, random or "
            "other-head. The others are hidden; with CHOICE:N:drop they only lose their weights. May be repeated.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a forward pass.")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Loss, perplexity and bits per byte over a whole split, each token counted once, with standard errors.

    Bits per byte spread the loss over the bytes of text that the tokens stand for; a separator and an unknown token
    stand for none. Each cut is compared with the whole model on the same windows; its 95 % interval is
    that of many windows, and too narrow for a few.
    """
    from cda_cli.console import note, print_json, progress, show_evaluation, shows_progress
    from cda_cli.data import loss_of_text
    from cda_cli.evaluation import evaluate_cuts, parse_cuts
    from cda_cli.restore import open_side, restore_on
    from cda_cli.signals import StopRequest

    cuts = parse_cuts(cut or ())
    with StopRequest() as stop:
        restored, precision = restore_on(checkpoint, device, dtype, backend, best=best, ema=ema)
        text = open_side(restored, data, split, stop, shows_progress() and not as_json, encoding)
        if remark := loss_of_text(text.sides):
            note(remark)
        batches, windows = text.batches(batch_size, max_batches)
        with progress("evaluating", windows * (1 + len(cuts)), quiet=as_json) as advance:
            batches = stop.until(batches)
            result, compared = evaluate_cuts(restored.model, batches, cuts, restored.device, precision, advance)
        stop.check("interrupted; nothing was written")
    if as_json:
        source = {"checkpoint": str(restored.path), "data": text.description, "split": text.split}
        print_json({**source, **result._asdict(), **({"cuts": [one.as_dict() for one in compared]} if cuts else {})})
    else:
        show_evaluation(result, compared, restored, text)
