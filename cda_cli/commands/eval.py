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
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a forward pass.")] = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Loss, perplexity and bits per byte over a whole split, each token counted once, with standard errors.

    Bits per byte spread the loss over the bytes of text that the tokens stand for; a separator and an unknown token
    stand for none.
    """
    from cda_cli.console import note, print_json, progress, show_evaluation, shows_progress
    from cda_cli.data import loss_of_text
    from cda_cli.evaluation import evaluate
    from cda_cli.restore import open_side, restore_on
    from cda_cli.signals import StopRequest

    with StopRequest() as stop:
        restored, precision = restore_on(checkpoint, device, dtype, backend, best=best, ema=ema)
        text = open_side(restored, data, split, stop, shows_progress() and not as_json, encoding)
        if remark := loss_of_text(text.sides):
            note(remark)
        batches, windows = text.batches(batch_size, max_batches)
        with progress("evaluating", windows, quiet=as_json) as advance:
            result = evaluate(restored.model, stop.until(batches), restored.device, precision, advance)
        stop.check("interrupted; nothing was written")
    if as_json:
        source = {"checkpoint": str(restored.path), "data": text.description, "split": text.split}
        print_json({**source, **result._asdict()})
    else:
        show_evaluation(result, restored, text)
