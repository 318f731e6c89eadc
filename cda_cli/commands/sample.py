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

SEEDS = 2**63  # that a generator takes


def sample(
    checkpoint: CheckpointArgument,
    best: BestOption = False,
    ema: EmaOption = False,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text to go on from; one for each --prompt.")
    ] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="UTF-8 text, a prompt a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens that are added to a prompt.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest tokens that make up this share.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens above this share of the likeliest's.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Samples for each prompt.")] = 1,
    seed: Annotated[
        int,
        typer.Option(min=0, help="Same seed, same text; each further sample takes the next seed."),
    ] = 0,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Print text as it comes, or when it is whole.")
    ] = True,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    backend: BackendOption = "auto",
    null: Annotated[
        bool, typer.Option("--null", "-0", help="No headings, and a NUL character after each sample, not a newline.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Text from a model. The prompt comes from --prompt, from --prompts-file, or from stdin where neither is given.

    A pipe or a file gets the prompt and the text exactly, and a newline after each sample; a terminal gets marks for
    control characters. Several samples have a heading each, which gives the seed that makes this sample alone. A
    program that takes samples apart reads --null or --json. A character that the encoding of stdout lacks is written
    as an escape such as \\u3042.
    """
    from cda_cli.console import SampleDisplay, print_json
    from cda_cli.errors import ConfigError
    from cda_cli.generation import SamplingSettings
    from cda_cli.generation.text import generate_text, read_prompts
    from cda_cli.plurals import counted
    from cda_cli.restore import restore_on
    from cda_cli.signals import StopRequest

    if null and as_json:
        raise ConfigError("--null and --json exclude each other; give one of them")
    settings = SamplingSettings(temperature, top_k, top_p, min_p)
    settings.check()
    prompts = read_prompts(prompt or (), prompts_file, sys.stdin)
    each = [(text, place, number) for place, text in enumerate(prompts, 1) for number in range(1, num_samples + 1)]
    if seed + len(each) > SEEDS:
        raise ConfigError(f"--seed {seed} is too large for {counted(len(each), 'sample')}; give a smaller one")
    samples = []
    with StopRequest() as stop:
        restored, precision = restore_on(checkpoint, device, dtype, backend, best=best, ema=ema)
        end, headings = ("\0", False) if null else ("\n", len(each) > 1)
        display = SampleDisplay(stream=stream, quiet=as_json, headings=headings, end=end)
        for own_seed, (text, place, number) in stop.until(enumerate(each, seed)):
            pieces = generate_text(restored, text, max_new_tokens, settings, seed=own_seed, dtype=precision, stop=stop)
            display.begin(f"prompt {place}, sample {number}, seed {own_seed}", text)
            samples.append({"prompt": text, "seed": own_seed, "text": display.follow(pieces)})
        stop.check("interrupted; nothing was written")
    if as_json:
        print_json({"checkpoint": str(restored.path), "samples": samples})
