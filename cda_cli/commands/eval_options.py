"""The options of `cda eval` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cda_cli.commands.completion import complete_checkpoint

CheckpointsArgument = Annotated[
    list[Path],
    typer.Argument(
        metavar="CHECKPOINT|RUN",
        help="Checkpoint folders, or runs: then their newest checkpoints. The others are compared with the first.",
        autocompletion=complete_checkpoint,
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=1,
        max=2**20,  # whose tables of rotary positions fit into any memory
        help="Most tokens in a window. Rotary positions and none allow more than in training.",
        show_default="that of the checkpoint",
    ),
]
StrideOption = Annotated[
    int | None,
    typer.Option(
        "--stride",
        min=1,
        help="Tokens that each window after the first one predicts. They see the rest of the window as context.",
        show_default="the context: windows are disjoint",
    ),
]
PerDocumentOption = Annotated[
    bool,
    typer.Option(
        "--per-document",
        help="Evaluate each document by itself, after the token that begins a document, or else the separator.",
    ),
]
MaxDocumentsOption = Annotated[int | None, typer.Option(min=1, help="Most documents to evaluate.")]
MaxBatchesOption = Annotated[int | None, typer.Option(min=1, help="Most batches to evaluate.")]
ByPositionOption = Annotated[
    bool, typer.Option("--by-position", help="Also the loss by how many tokens of the window a prediction sees.")
]
CalibrationOption = Annotated[
    bool,
    typer.Option("--calibration", help="Also the expected calibration error: how far confidence is from accuracy."),
]
LossesOption = Annotated[
    Path | None,
    typer.Option(
        "--losses",
        metavar="FILE",
        help="Write a JSON line for each document or window. An evaluation that was interrupted goes on from it.",
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Draw cuts, loss against keys kept, or synthetic tasks, accuracy against length, as .png, .svg or .pdf.",
    ),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Sequences in a forward pass.")]
