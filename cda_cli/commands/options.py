"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT|RUN", help="A checkpoint folder, or a run: then its newest checkpoint.")
]
BestOption = Annotated[
    bool, typer.Option("--best", help="Of a run: the checkpoint with the lowest validation loss, not the newest.")
]
EmaOption = Annotated[
    bool, typer.Option("--ema", help="The moving average of the weights, of a run with optim.ema_decay.")
]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="stdlib, a path or glob, or hf:OWNER/NAME[:CONFIG]; the run's own where not given."),
]
EncodingOption = Annotated[
    str | None,
    typer.Option(
        "--encoding", help="Of local files; where not given, that of the run for its own text, and utf-8 for another."
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="Part of the text: validation, train (both as in training) or all; where not given, validation of the "
        "run's own text, and all of another.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 …")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32 or bfloat16: of the matrix products.")]
BackendOption = Annotated[str, typer.Option("--backend", help="Backend of the operator: auto, torch, triton or colt5.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; words go to stderr.")]
