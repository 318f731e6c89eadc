"""Options of `cda inspect-sparsity`."""

from __future__ import annotations

from typing import Annotated

import typer

FailIfOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONDITION",
        help="Exit with 3 if it holds, such as 'support.p95 > 64'; a figure has its name in --json. May be repeated.",
    ),
]
