"""Draws docs/overview.svg, the picture of the README, from real runs.

    cda train … --out SOFT_TOPK                      in tmux, 104 columns wide
    tmux capture-pane -e -p > CAPTURE                while it trains
    cda train … --out SOFTMAX --attention softmax
    python docs/picture.py CAPTURE SOFT_TOPK SOFTMAX

Under the live view stand the weights of one head of each run: of all heads the one with the smallest effective support
on the beginning of the run's own validation text.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import torch
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cda_cli.console.heat_map import heat_map
from cda_cli.inspection import ReportWatcher, inspect
from cda_cli.restore import open_side, restore
from cda_cli.signals import StopRequest

PICTURE = Path(__file__).parent / "overview.svg"
COLUMNS = 104
TOKENS = 19
WEB_FONTS = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)  # a page would fetch them from a third party


def sharpest_head(run: str) -> tuple[Group, Text]:
    """The map of the head with the smallest effective support, under its name; and the meaning of its shades."""
    restored = restore(Path(run), torch.device("cpu"))
    with StopRequest() as stop:
        side = open_side(restored, None, None, stop, show_progress=False)
    batches = [next(side.batches(1, 1)[0])]

    watcher = ReportWatcher()
    inspect(restored.model, batches, restored.device, torch.float32, watcher)
    head = min(watcher.report().heads, key=lambda head: head.measures["effective_support"])
    watcher = ReportWatcher(keep=(head.layer, head.head))
    inspect(restored.model, batches, restored.device, torch.float32, watcher)
    kept = watcher.kept
    assert kept is not None
    tokens = [restored.tokenizer.decode([int(token)]) for token in batches[0].inputs[0]]
    drawn = heat_map(kept.tolist(), tokens, 10 + 2 * TOKENS).split("\n")
    attention = restored.config.model.attention
    name = f"{attention}, k = {head.measures['sparsity_k']:.2f}" if attention != "softmax" else attention
    title = Text(f"{name}: layer {head.layer}, head {head.head}", style="bold")
    return Group(title, Text("\n").join(list(drawn)[:-1])), drawn[-1]


def main(capture: str, *runs: str) -> None:
    screen = Text.from_ansi(Path(capture).read_text(encoding="utf-8")).split("\n")
    header = max(number for number, line in enumerate(screen) if " layers × " in line.plain)
    view = Text("\n").join(screen[header:])  # What stands above the live view has scrolled by.
    view.rstrip()
    maps = Table.grid(padding=(0, 2))
    drawn, shades = zip(*map(sharpest_head, runs), strict=True)
    maps.add_row(*drawn)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Group(view, "", maps, "", shades[0]))
    console.save_svg(
        str(PICTURE),
        title="cda train, and below it the sharpest head of each model",
        code_format=WEB_FONTS.sub("", CONSOLE_SVG_FORMAT),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
