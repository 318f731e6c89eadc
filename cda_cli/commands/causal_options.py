"""The options of `cda eval` for causal checks (docs/causal-checks.md)."""

from __future__ import annotations

from typing import Annotated

import typer

CAUSAL = "Causal checks: the loss of a model that is changed without training"

CutOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CHOICE:N,N",
        help="Also with only N keys for each query: top (the largest weights), or as controls recent, sink (the first "
        "and the latest), distance-matched, random or other-head. The others are hidden; with CHOICE:N:drop they only "
        "lose their weights. Of the feed-forward: units and, as control, random-units. 1..64 doubles from 1 to 64; "
        "curve is all choices of keys at 1..256. May be repeated.",
        rich_help_panel=CAUSAL,
    ),
]
AsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--as",
        metavar="WEIGHTS",
        help="Also with other attention weights: gate (k·softmax(s/ε)), softmax, capped or free (those keys only), "
        "eps=X, k=X, k*F (beside what ∂L/∂k predicts); or with random-weights. May be repeated.",
        rich_help_panel=CAUSAL,
    ),
]
AblateOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="heads|heads:ORDER",
        help="Also with each head replaced by its mean output; with an order (support, capped, k, gradient, or random "
        "as control) 1, 2, 4 … heads together, from the smallest. May be repeated.",
        rich_help_panel=CAUSAL,
    ),
]
ToleranceOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="The fewest keys of each choice that cost at most so many bits per byte, chosen on every other "
        "observation and measured on the rest.",
        rich_help_panel=CAUSAL,
    ),
]
FailIfOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="CONDITION",
        help="Exit with 3 if it holds, such as 'top[32].difference_hi > 0.01'; a metric has its name in --json. May be "
        "repeated.",
    ),
]
