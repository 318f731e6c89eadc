"""`cda bench-decode`."""

from __future__ import annotations

from typing import Annotated

import typer

from cda_cli.commands.key_options import MaxKeysOption, ToleranceOption, checked_selection
from cda_cli.commands.options import (
    BackendOption,
    BestOption,
    CheckpointArgument,
    DeviceOption,
    DtypeOption,
    EmaOption,
    JsonOption,
)

DEFAULT_LENGTH = 128  # tokens of the prompt, and new ones


def bench_decode(
    checkpoint: CheckpointArgument,
    best: BestOption = False,
    ema: EmaOption = False,
    prompt_length: Annotated[
        int | None,
        typer.Option(min=1, show_default="128, or half the context", help="Tokens of each prompt, which are random."),
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(min=2, show_default="128, or half the context", help="Tokens that follow each prompt.")
    ] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, show_default="1", help="Prompts at once; a line of the table for each --batch-size."),
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile a step by torch.compile, which takes up to a minute at first.")
    ] = False,
    max_keys: MaxKeysOption = None,
    tolerance: ToleranceOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """The speed of decoding: time to the first token, tokens a second, and bytes read beside the memory's bandwidth.

    A step reads every weight, and the keys and values of every row. At the bandwidth that is measured at the start, it
    could take no less time: that is the ceiling. What --max-keys leaves out does not count, and neither do the weights
    of feed-forward units that are 0 where they are left out: by a single row on a CPU, and with --backend triton by up
    to 16 rows, those of blocks that no row selects. Times are medians of three batches; kernels are compiled before.
    The time to the first token includes that of a cache, and of a copy of the weights where --dtype is not float32.
    """
    from cda_cli.console import print_json, show_decode_speed
    from cda_cli.errors import ConfigError
    from cda_cli.generation.benchmark import bench_decode, memory_bandwidth
    from cda_cli.restore import restore_on
    from cda_cli.runtime import describe_device
    from cda_cli.signals import StopRequest

    selection = checked_selection(max_keys, tolerance)
    if compiled and selection:
        raise ConfigError("--compile and --max-keys exclude each other; give one of them")
    with StopRequest() as stop:
        restored, precision = restore_on(checkpoint, device, dtype, backend, best=best, ema=ema)
        with stop.at_once("interrupted; nothing was written"):
            bandwidth, half = memory_bandwidth(restored.device), restored.config.model.seq_len // 2
            speeds = [
                bench_decode(
                    restored.model,
                    precision,
                    bandwidth,
                    batch_size=size,
                    prompt_length=prompt_length or min(DEFAULT_LENGTH, half),
                    new_tokens=new_tokens or min(DEFAULT_LENGTH, half),
                    compiled=compiled,
                    selection=selection,
                )
                for size in batch_size or [1]
            ]
    about = {
        "checkpoint": str(restored.path),
        "attention": restored.model.attention_description,
        "device": describe_device(restored.device),
        "dtype": str(precision).removeprefix("torch."),
    }
    if as_json:
        measured = {"compiled": compiled, "memory_bandwidth_gb_per_s": bandwidth / 1e9}
        print_json({**about, **measured, "measurements": [speed._asdict() for speed in speeds]})
    else:
        ceiling = f"{bandwidth / 1e9:,.3g} GB/s, measured"
        show_decode_speed({**about, "compiled": "yes" if compiled else "no", "memory bandwidth": ceiling}, speeds)
