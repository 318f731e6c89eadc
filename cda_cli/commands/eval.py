"""`cda eval`."""

from __future__ import annotations

from cda_cli.commands.eval_options import BatchSizeOption, CutOption, MaxBatchesOption
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
    max_batches: MaxBatchesOption = None,
    cut: CutOption = None,
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Loss, perplexity and bits per byte over a whole split, each token counted once, with standard errors.

    Bits per byte spread the loss over the bytes of text that the tokens stand for; a separator and an unknown token
    stand for none. Each cut is compared with the whole model on the same windows; its 95 % interval
    is too narrow for a few windows.
    """
    from cda_cli.console import note, print_json, progress, show_evaluation, shows_progress
    from cda_cli.data import loss_of_text
    from cda_cli.evaluation import (
        Comparison,
        compared_cuts,
        joined,
        measure,
        parse_cuts,
        ways_of_cuts,
        windows_as_units,
    )
    from cda_cli.restore import open_side, restore_on
    from cda_cli.signals import StopRequest

    cuts = parse_cuts(cut or ())
    with StopRequest() as stop:
        restored, precision = restore_on(checkpoint, device, dtype, backend, best=best, ema=ema)
        text = open_side(restored, data, split, stop, shows_progress() and not as_json, encoding)
        if remark := loss_of_text(text.sides):
            note(remark)
        batches, windows = text.batches(batch_size, max_batches)
        ways = ways_of_cuts(restored.model, cuts)
        with progress("evaluating", windows * len(ways), quiet=as_json) as advance:
            measured = measure(restored.model, stop.until(batches), restored.device, precision, ways, advance)
            sums = joined(measured)
        stop.check("interrupted; nothing was written")
    comparison = Comparison(sums, windows_as_units(windows))
    compared = compared_cuts(comparison, cuts)
    if as_json:
        source = {"checkpoint": str(restored.path), "data": text.description, "split": text.split}
        print_json(
            {
                **source,
                **comparison.evaluation()._asdict(),
                **({"cuts": [one.as_dict() for one in compared]} if cuts else {}),
            }
        )
    else:
        show_evaluation(comparison, compared, restored, text)
