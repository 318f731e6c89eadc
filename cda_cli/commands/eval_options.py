"""The options of `cda eval` alone."""

from __future__ import annotations

from typing import Annotated

import typer

MaxBatchesOption = Annotated[int | None, typer.Option(min=1, help="Most batches to evaluate.")]
CutOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CHOICE:N,N",
        help="Also with only N keys for each query: top (the largest weights), or as controls recent, sink (the "
        "first and the latest), random or other-head. The others are hidden; with CHOICE:N:drop they only lose "
        "their weights. May be repeated.",
    ),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Sequences in a forward pass.")]
