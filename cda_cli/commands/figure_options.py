"""The options of `cda inspect-sparsity` for figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cda_cli.commands.completion import completion

DEFAULT_STYLES = ["paper"]
STYLES = ("paper", "slides", "dark", "mono")
FIGURES = "Figures for papers and slides"

FiguresOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Write figures into this folder, as PDF, SVG and PNG, each with its numbers as CSV. Needs matplotlib.",
        rich_help_panel=FIGURES,
    ),
]
StyleOption = Annotated[
    list[str] | None,
    typer.Option(
        "--figure-style",
        metavar="STYLE",
        help="The look of the figures: paper, slides, dark or mono; paper where not given. May be repeated.",
        autocompletion=completion(STYLES),
        rich_help_panel=FIGURES,
    ),
]
