"""`cda export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cda_cli.commands.completion import completion
from cda_cli.commands.options import BestOption, CheckpointArgument, EmaOption, JsonOption

FORMATS = ("hf", "published")


def export(
    checkpoint: CheckpointArgument,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write, which is new or empty.")],
    format: Annotated[
        str,
        typer.Option(
            help="hf, for AutoModelForCausalLM of transformers; or published, weights for the Transformer of "
            "coordinate_descent_attention.",
            autocompletion=completion(FORMATS),
        ),
    ] = "hf",
    best: BestOption = False,
    ema: EmaOption = False,
    license: Annotated[
        str | None,
        typer.Option(
            help="Licence that the model card names, such as mit or apache-2.0; where not given, that of the model "
            "which was imported, or unknown."
        ),
    ] = None,
    push_to: Annotated[
        str | None, typer.Option("--push-to", metavar="OWNER/NAME", help="Also send DIR to the Hugging Face hub.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what --push-to would send; send and keep nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """A model as other tools load it: configuration, weights, tokenizer and a model card with the figures of its run.

    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True) then gives the logits of this checkpoint. It needs
    the package cda-cli. A softmax model that is a GPT-2, Llama or Qwen is written as that, and needs no code of ours.
    The folder appears whole, or not at all.
    """
    from tempfile import TemporaryDirectory

    from cda_cli.console import print_json, show_export
    from cda_cli.interchange.export import export
    from cda_cli.interchange.push import check_push, how_to_send, push
    from cda_cli.signals import StopRequest

    check_push(push_to, dry_run)
    name, address = push_to or folder.resolve().name, None
    with StopRequest() as stop, TemporaryDirectory() as scratch:
        target = Path(scratch, "export") if dry_run else folder
        with stop.at_once("interrupted; nothing was written"):
            exported = export(checkpoint, target, format, name=name, license=license, best=best, ema=ema)
        if push_to and not dry_run:
            with stop.at_once(f"interrupted; {folder} is whole; {how_to_send(folder, push_to)}"):
                address = push(folder, push_to)
    if as_json:
        document = {"checkpoint": str(exported.checkpoint), "format": format, "files": exported.files}
        print_json(document | {"folder": None if dry_run else str(folder), "pushed_to": address})
    else:
        show_export(exported, address, push_to if dry_run else None)
