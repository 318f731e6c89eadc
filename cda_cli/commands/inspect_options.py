"""Options of `cda inspect-sparsity`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

LayersOption = Annotated[str | None, typer.Option(help="Layers to report, such as 0,2-3; all where not given.")]
HeadsOption = Annotated[str | None, typer.Option(help="Heads to report; the first is drawn as a heat map.")]
ByOption = Annotated[
    str, typer.Option(metavar="MEASURE", help="The measure of the map of all heads; docs/inspection.md lists them.")
]
WindowsOption = Annotated[int, typer.Option(min=1, help="Sequences of the text to look at.")]
FailIfOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONDITION",
        help="Exit with 3 if it holds, such as 'support.p95 > 64'; a metric has its name in --json. May be repeated.",
    ),
]
CausalOption = Annotated[
    bool,
    typer.Option(
        "--causal",
        help="Also causal checks on the same text: the loss with 1, 2, 4 … keys for each query, beside that of "
        "other choices of as many, and with each row as k·softmax(s/ε).",
    ),
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Write the report as one page that works offline, with what each token reads in each head."
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="The page takes at most so many bytes, such as 800kB; 12MB where not given."),
]
