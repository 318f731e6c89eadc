"""The live view: it fits every terminal, loses nothing that matters, and is in its place after a resize."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from cda_cli.config import parse
from cda_cli.console.live_view import NOTICE, LiveView, ResizableLive
from cda_cli.console.run_status import RunStatus
from cda_cli.console.sparkline import ASCII, BLOCKS
from cda_cli.training.display import Plan
from tests.console.plans import PLAN, records, status_of


def drawn(status: RunStatus, width: int, height: int) -> list[str]:
    """The lines of the view on a terminal of this size."""
    console = Console(file=io.StringIO(), width=width, height=height, highlight=False, no_color=True)
    console.print(LiveView(status))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


plans = st.builds(
    lambda budget, steps: PLAN._replace(has_budget=budget, steps=steps), st.booleans(), st.integers(10, 10**6)
)


@settings(deadline=None, max_examples=40)
@given(
    plans, st.integers(6, 60), st.integers(40, 240), st.integers(1, 100), st.booleans(), st.booleans(), st.booleans()
)
def test_it_fits_every_terminal(
    plan: Plan, height: int, width: int, layers: int, averaged: bool, known_peak: bool, stopping: bool
) -> None:
    """The bar is the last line, and no line is cut by the terminal, or wrapped."""
    for shown in ([], records(layers, averaged, known_peak)):
        status = status_of(plan, shown)
        status.is_stopping = stopping
        lines = drawn(status, width, height)
        assert len(lines) <= height, "taller than the terminal"
        assert re.match(r"step \d+/\d+ ", lines[-1])
        assert lines[-1].endswith(" left")
        assert max(map(cell_len, lines)) <= width, "wider than the terminal"
        assert (NOTICE[:width].rstrip() in lines) == stopping
        assert not [line for line in lines if line.endswith(" ")]
        if shown:
            assert any(line.startswith("loss ") for line in lines)


@pytest.mark.parametrize("height", [10, 16, 24, 40])
def test_layers_that_do_not_fit_become_ranges(height: int) -> None:
    """Every layer is in a row of its own or in the range, whose ends are the lowest and the highest value."""
    lines = drawn(status_of(PLAN, records(100)), 80, height)
    header = next(index for index, line in enumerate(lines) if line.startswith("layer "))
    rows = [line.split() for line in lines[header + 1 : -1] if line]
    alone = [int(row[0]) for row in rows if row[0].isdigit()]
    merged = next(row for row in rows if not row[0].isdigit())
    count = int(re.sub(r"\D", "", merged[0] + merged[1]))
    assert count + len(alone) == 100
    hidden = sorted(set(range(100)) - set(alone))
    assert len(hidden) == count
    assert f"{4.0 + hidden[0]:.1f}–{4.0 + hidden[-1]:.1f}" in merged


def test_layers_that_fit_are_all_shown() -> None:
    assert not [line for line in drawn(status_of(PLAN, records(12)), 120, 40) if "more" in line]


def test_curves_best_and_pace() -> None:
    text = drawn(status_of(PLAN, records(4)), 100, 30)
    loss, validation, best = (next(line for line in text if line.startswith(name)) for name in ("loss", "vali", "best"))
    assert loss.endswith("  ██▇▆▅▄▃▂▁▁")
    assert validation.endswith("  █▇▆▁▄"), "the fourth is the lowest"
    assert "3.0000 at step 8; the last validation was at step 10" in best
    assert any("learning rate  1.00e-03, gradient norm 0.75" in line for line in text)
    assert any("1 k tokens/s" in line for line in text)
    assert re.search(r"0:0\d elapsed  (1:01|1:00|0:5\d) left$", text[-1])


def test_a_header_names_key_heads_that_are_fewer() -> None:
    plan = PLAN._replace(config=parse({"model": {"kv_heads": 1}}))
    assert "4 heads on 1 key head, context 256" in "\n".join(drawn(status_of(plan, records(4)), 80, 24))


def test_a_header_names_the_run() -> None:
    text = "\n".join(drawn(status_of(PLAN, records(4)), 80, 24))
    for words in ("4 layers × 128, 4 heads, context 256", "batch 16", "learning rate 0.001", PLAN.attention):
        assert words in text


@pytest.mark.parametrize(("width", "lines"), [(80, 3), (120, 2), (200, 1)])
def test_the_header_has_as_few_lines_as_it_fits_in(width: int, lines: int) -> None:
    assert drawn(status_of(PLAN, records(4)), width, 24).index("") == lines


def test_a_wide_terminal_has_two_columns() -> None:
    lines = drawn(status_of(PLAN, records(4)), 160, 24)
    assert any(line.startswith("loss ") and "effective support" in line for line in lines)
    narrow = drawn(status_of(PLAN, records(4)), 100, 24)
    assert not any(line.startswith("loss ") and "effective support" in line for line in narrow)


def test_a_rule_without_a_budget_has_no_k() -> None:
    text = "\n".join(drawn(status_of(PLAN._replace(has_budget=False), records(4)), 100, 24))
    assert "effective support" in text
    assert "mean k" not in text
    assert "capped" not in text


def test_an_encoding_without_blocks_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stdout)
    console = Console(file=stdout, width=80, height=24, highlight=False)
    text = "".join(
        segment.text for line in console.render_lines(LiveView(status_of(PLAN, records(100)))) for segment in line
    )
    assert len(set(text.partition("bits per byte")[2][:20]) & set(ASCII)) > 4
    assert not set(text) & {*BLOCKS, "–", "…"}


class Terminal(io.StringIO):
    """A terminal that understands what rich writes. It wraps lines that a resize makes too long, and joins them again.

    What scrolls away at the top comes back when it grows. Each row says whether it continues the one above.
    """

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.rows, self.row, self.column = [("", False)], 0, 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for control, newline, plain in re.findall(r"\x1b\[([?0-9;]*[A-Za-z])|([\r\n])|([^\x1b\r\n]+)", text):
            if newline:
                self.column = 0
                if newline == "\n":
                    self.row += 1
                    self.rows += [("", False)] * (self.row + 1 - len(self.rows))
            elif control == "2K":
                self.rows[self.row] = ("", False)
            elif control.endswith("A"):
                self.row = max(len(self.rows) - self.height, self.row - int(control[:-1] or 1), 0)
            elif plain:
                assert self.column + cell_len(plain) <= self.width, "a line is wrapped"
                row, continues = self.rows[self.row]
                row = row.ljust(self.column)
                self.rows[self.row] = (row[: self.column] + plain + row[self.column + len(plain) :], continues)
                self.column += len(plain)
        return len(text)

    def resize(self, width: int, height: int) -> None:
        """The cursor is at the end of the view. A lower terminal first loses the blank rows below it."""
        below = len(self.rows) - 1 - self.row
        lines: list[str] = []
        for row, continues in self.rows[: self.row + 1]:
            if continues:
                lines[-1] += row
            else:
                lines.append(row)
        rows = [
            (line[start : start + width], start > 0) for line in lines for start in range(0, max(1, len(line)), width)
        ]
        self.row, self.column = len(rows) - 1, len(rows[-1][0])
        below = max(0, below - max(0, self.height - height))
        self.rows = rows + [("", False)] * below
        self.width, self.height = width, height

    def screen(self) -> list[str]:
        """The rows that can be seen, but for blank ones."""
        return [row for row, _ in self.rows[-self.height :] if row.strip()]


@pytest.mark.parametrize("layers", [1, 30])
@pytest.mark.parametrize(
    "sizes",
    [
        [(80, 60)],
        [(200, 15)],
        [(60, 12)],
        [(120, 40), (80, 24), (120, 40), (60, 24)],
    ],
)
def test_a_resize_leaves_nothing_torn(sizes: list[tuple[int, int]], layers: int) -> None:
    """Once the terminal is as large as it was, it shows the view once, and keeps what was printed before."""
    terminal = Terminal(200, 60)
    console = Console(file=terminal, force_terminal=True, width=200, height=60, no_color=True)
    console.print("printed before")
    live = ResizableLive(LiveView(status_of(PLAN, records(layers))), console)
    live.auto_refresh = False
    live.start(refresh=True)
    for width, height in [*sizes, (200, 60)]:
        terminal.resize(width, height)
        console.size = (width, height)  # type: ignore[assignment]
        live.refresh()
    expected = [line for line in drawn(status_of(PLAN, records(layers)), 200, 60) if line]
    assert ("printed before", False) in terminal.rows, "what stood above is lost"
    shown = [row for row in terminal.screen() if row != "printed before"]
    assert [row.split("  ")[0] for row in shown] == [line.split("  ")[0] for line in expected]
    live.stop()


MUTED = """
import json, sys, termios
from cda_cli.console.live_view import LiveView, ResizableLive
from rich.console import Console
from tests.console.plans import PLAN, records, status_of

def mode():
    flags = termios.tcgetattr(1)[3]
    return [bool(flags & termios.ECHO), bool(flags & termios.NOFLSH)]

live = ResizableLive(LiveView(status_of(PLAN, records(1))), Console(force_terminal=True))
modes = [mode()]
live.start(refresh=True)
modes.append(mode())
live.stop()
open(sys.argv[1], "w").write(json.dumps([*modes, mode()]))
"""


def test_what_is_typed_is_not_shown_while_it_is_drawn(tmp_path: Path) -> None:
    """The ^C that a terminal echoes would move the view, and with it goes what is on the way to the terminal."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", MUTED, str(tmp_path / "modes")])
    with contextlib.suppress(OSError):  # the end of the child closes the terminal
        while os.read(terminal, 4096):
            pass
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
    before, during, after = json.loads((tmp_path / "modes").read_text())
    assert (before, during, after) == ([True, False], [False, True], before)
