"""Draws a head's weights over real tokens, in shades that also read without colour."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from cda_cli.token_labels import visible

SHADES = " ·░▒▓█"  # weight 0, and then up to 1 in five equal steps
COLOURS = ("grey50", "grey62", "cyan", "green", "yellow", "bold red")
LABEL_WIDTH = 8
CELL_WIDTH = 2
LARGEST = 48
NULL = "∅"


def heat_map(weights: Sequence[Sequence[float]], tokens: Sequence[str], width: int) -> Text:
    """Draws the first queries as rows and their keys as columns, null keys first: as many as fit into `width` columns.

    weights [T][S]; tokens [T], the text of each position. Each key is headed by the first character of its token.
    """
    null = len(weights[0]) - len(weights)
    size = min(len(tokens), LARGEST, max(4, (width - LABEL_WIDTH - 2) // CELL_WIDTH - null))
    picture = Text(no_wrap=True, overflow="crop")
    heads = [NULL] * null + [visible(token)[:1] for token in tokens[:size]]
    picture.append(" " * (LABEL_WIDTH + 1))
    picture.append("".join(set_cell_size(head, CELL_WIDTH) for head in heads).rstrip() + "\n", style="bold")
    for query in range(size):
        picture.append(_right(visible(tokens[query])) + " ", style="bold")
        for weight in weights[query][: query + 1 + null]:
            level = 0 if weight <= 1e-3 else 1 + min(4, int(weight * 5))
            picture.append(SHADES[level] * CELL_WIDTH, style=COLOURS[level])
        picture.append("\n")
    picture.append(f"{'λ:':>{LABEL_WIDTH}} ")
    for level, words in enumerate(("≤ 1e-3", "to 0.2", "to 0.4", "to 0.6", "to 0.8", "to 1")):
        picture.append(SHADES[level] * CELL_WIDTH, style=COLOURS[level])
        picture.append(f" {words}  ")
    return picture


def _right(label: str) -> str:
    """Returns the beginning of the label in LABEL_WIDTH cells, which are fewer characters if some are wide."""
    fits = set_cell_size(label, min(cell_len(label), LABEL_WIDTH))
    return " " * (LABEL_WIDTH - cell_len(fits)) + fits
