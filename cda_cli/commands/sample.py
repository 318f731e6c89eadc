"""`cda sample`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cda_cli.commands.options import (
    BackendOption,
    BestOption,
    CheckpointArgument,
    DeviceOption,
    DtypeOption,
    EmaOption,
    JsonOption,
)


def sample(
    checkpoint: CheckpointArgument,
    best: BestOption = False,
    ema: EmaOption = False,
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="UTF-8 text, a prompt a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens that are added to a prompt.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest tokens that make up this share.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens above this share of the likeliest's.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Samples for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same text.")] = 0,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it comes, or when it is whole.")
    ] = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Text from a model. The prompt comes from --prompt, from --prompts-file, or from stdin where neither is given.

    A pipe or a file gets the prompt and the text exactly, and a newline after each sample; a terminal gets marks for
    control characters. A character that the encoding of stdout lacks is written as an escape such as \\u3042.
    """
    from cda_cli.console import SampleDisplay, print_json
    from cda_cli.generation import SamplingSettings
    from cda_cli.generation.text import generate_text, read_prompts
    from cda_cli.restore import restore_on
    from cda_cli.signals import StopRequest

    settings = SamplingSettings(temperature, top_k, top_p, min_p)
    settings.check()
    prompts = read_prompts(prompt, prompts_file, sys.stdin)
    samples = []
    with StopRequest() as stop:
        restored, precision = restore_on(checkpoint, device, dtype, backend, best=best, ema=ema)
        display = SampleDisplay(stream=stream, quiet=as_json, several=len(prompts) * num_samples > 1)
        for index, text in enumerate(prompts):
            for number in range(num_samples):
                pieces = generate_text(
                    restored, text, max_new_tokens, settings, seed=seed + number, dtype=precision, stop=stop
                )
                display.begin(index, number, text)
                samples.append({"prompt": text, "seed": seed + number, "text": display.follow(pieces)})
        stop.check("interrupted; nothing was written")
    if as_json:
        print_json({"checkpoint": str(restored.path), "samples": samples})
