"""`cda import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from cda_cli.commands.options import JsonOption, SetOption


def import_model(
    source: Annotated[
        str,
        Argument(
            metavar="MODEL",
            help="PATH of a folder that transformers saved, or of a GGUF file, hf:OWNER/NAME of the Hugging Face hub, "
            "or published:FILE, weights of coordinate_descent_attention as safetensors.",
        ),
    ],
    out: Annotated[Path, Option("--out", "-o", help="Folder of the run that is made.")],
    seq_len: Annotated[
        int | None, Option(min=2, help="Context in tokens, where it is to be shorter than the model's own.")
    ] = None,
    attn_k: Annotated[
        float | None, Option(help="Budget k of soft top-k attention, whose output is divided by k; 1 is softmax.")
    ] = None,
    attn_eps: Annotated[float | None, Option(help="Temperature ε of soft top-k attention; 1 is softmax.")] = None,
    tokenizer: Annotated[
        str | None, Option(help="A tokenizer.json, a hub id or bytes, where the model has no tokenizer of its own.")
    ] = None,
    set_: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a run of a model of another tool: GPT-2, Llama, Qwen2, Qwen3 or Mistral.

    Its attention is softmax unless --attn-k or --attn-eps asks for the soft top-k. Its weights are read from
    safetensors or GGUF; no code of the model runs. The other commands take the run as any other, and cda train
    --init-from goes on from it.
    """
    from cda_cli.console import print_json, progress, show_import
    from cda_cli.interchange.import_model import import_model
    from cda_cli.signals import StopRequest

    with StopRequest() as stop, stop.at_once("interrupted; nothing was written"):
        imported = import_model(
            source,
            out,
            lambda tensors: progress("importing", tensors, quiet=as_json),
            seq_len=seq_len,
            attn_k=attn_k,
            attn_eps=attn_eps,
            tokenizer=tokenizer,
            sets=set_ or (),
        )
    if as_json:
        print_json(imported.as_dict())
    else:
        show_import(imported)
