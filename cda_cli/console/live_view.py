"""The live view of a run, which is laid out anew for the size that the terminal has at each moment."""

from __future__ import annotations

import math
import os
import termios
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import ControlType, Segment
from rich.table import Table
from rich.text import Text

from cda_cli.console.base import Trimmed, duration
from cda_cli.console.layer_table import layer_table, measures
from cda_cli.console.run_status import ALARMS, RunStatus, header_rows, metric_rows
from cda_cli.console.sparkline import sparkline

WIDE = 150  # columns from which the layers stand beside the metrics
ROOMY = 16  # rows from which there are a title, blank lines, and some lines of history above the view
LABEL = 13  # columns of the name of a metric
NOTICE = "stopping: this step is finished and saved first"


class LiveView:
    """Draws `status`. The last line is always the progress bar, and no line is wrapped.

    `drawn` are the columns that each line of the latest drawing takes.
    """

    def __init__(self, status: RunStatus) -> None:
        self.status = status
        self.drawn: list[int] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(Trimmed(self._layout(console, options)), options.update(height=None), pad=False)
        self.drawn = [Segment.get_line_length(line) for line in lines]
        for line in lines:
            yield from line
            yield Segment.line()

    def _layout(self, console: Console, options: ConsoleOptions) -> Group:
        width, height = options.max_width, options.max_height
        is_roomy = height >= ROOMY
        room = height - 3 if is_roomy else height - 1
        below: list[RenderableType] = [Text(NOTICE, style="bold yellow", no_wrap=True)] * self.status.is_stopping
        below.append(self._bar(width))
        above = self._title(width) if is_roomy else []
        room -= len(above) + len(below)
        draw = self._beside if width >= WIDE else self._stacked
        middle = draw(console, options, room)
        return Group(*above, *middle, *below)

    def _stacked(self, console: Console, options: ConsoleOptions, room: int) -> list[RenderableType]:
        """Metrics, and the layers below them in what is left of `room` rows."""
        gap: list[RenderableType] = [""] * (options.max_height >= ROOMY)
        shown = self._metrics(options, max(1, room - 2 - 2 * len(gap)))
        rows = room - len(shown) - 2 * len(gap) - 1
        layers = [self._layers(console, options, rows), *gap] if self.status.train and rows > 0 else []
        return [*shown, *gap, *layers]

    def _beside(self, console: Console, options: ConsoleOptions, room: int) -> list[RenderableType]:
        """Metrics, and the layers to the right of them, in `room` rows."""
        half = options.update_width((options.max_width - 4) // 2)
        columns = Table.grid(padding=(0, 4, 0, 0))
        columns.add_column(width=half.max_width, no_wrap=True)
        columns.add_column(no_wrap=True)
        layers = self._layers(console, half, max(1, room - 2)) if self.status.train else ""
        columns.add_row(Group(*self._metrics(half, room - 1)), layers)
        return [columns, ""]

    def _title(self, width: int) -> list[RenderableType]:
        """The rows of the header in as few lines as they fit in."""
        lines: list[str] = []
        for row in header_rows(self.status.plan).values():
            joined = f"{lines[-1]}, {row}" if lines else row
            if lines and cell_len(joined) <= width:
                lines[-1] = joined
            else:
                lines.append(row)
        return [*(Text(line, style="bold", no_wrap=True, overflow="ellipsis") for line in lines), ""]

    def _metrics(self, options: ConsoleOptions, rows: int) -> list[RenderableType]:
        """A line for each metric, at most `rows` of them."""
        plan = self.status.plan
        shown = metric_rows(self.status)
        if not shown:
            compiling = ", and the first step compiles the model" if plan.compiled else ""
            every = plan.config.run.log_every
            words = f"metrics come every {f'{every} steps' if every > 1 else 'step'}{compiling}"
            return [Text(words, style="dim", no_wrap=True, overflow="ellipsis")]
        curves = {"loss": self.status.losses, "validation": self.status.validation_losses}
        widest = max(len(shown[name]) for name in curves)
        space = options.max_width - LABEL - 2 - widest - 2
        lines: list[RenderableType] = []
        for name, value in shown.items():
            line = Text.assemble((f"{name:<{LABEL}}  ", "bold"), no_wrap=True, overflow="ellipsis")
            line.append(value, style="yellow" if name == ALARMS else "")
            if name in curves and space >= 4:
                curve = sparkline(list(curves[name]), min(space, 60))
                line.append(" " * (widest - len(value) + 2) + curve, style="cyan")
            lines.append(line)
        return lines[:rows]

    def _layers(self, console: Console, options: ConsoleOptions, rows: int) -> Table:
        """The layers in `rows` rows and a header, with as many columns as fit."""
        assert self.status.train
        dash = "-" if options.ascii_only else "–"
        columns = measures(self.status.train.layers, self.status.plan.has_budget)
        while True:
            made = layer_table(self.status.train.layers, columns, rows, dash)
            # Measured for more columns than there are, as a measurement ends there.
            needed = Measurement.get(console, options.update_width(2 * WIDE), made).maximum
            if needed <= options.max_width or len(columns) == 1:
                return made
            columns.pop()

    def _bar(self, width: int) -> Table:
        status, steps = self.status, self.status.plan.steps
        bar = Table.grid(padding=(0, 2, 0, 0), expand=True)
        words = [f"step {status.step}/{steps}", f"{status.step / steps:.0%}"]
        if width >= 60:
            words.append(f"{duration(status.elapsed)} elapsed")
        words.append(f"{duration(status.seconds_left)} left")
        bar.add_column(no_wrap=True)
        bar.add_column(ratio=1, min_width=1)
        for _ in words[1:]:
            bar.add_column(no_wrap=True)
        bar.add_row(words[0], ProgressBar(total=steps, completed=status.step), *words[1:])
        return bar


def _rows(lines: list[int], width: int) -> int:
    """The rows that lines of so many columns take in a terminal of this width."""
    return sum(max(1, math.ceil(columns / width)) for columns in lines)


def _mute(terminal: IO[str]) -> Callable[[], None]:
    """Keeps a terminal from showing what is typed, and returns what undoes that.

    A ^C or a line end that it echoes would move the view, and with a ^C it throws away what is on the way to it.
    """
    try:
        descriptor = terminal.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, termios.error):
        return lambda: None
    muted = [*before[:3], before[3] & ~termios.ECHO | termios.NOFLSH, *before[4:]]
    _set_mode(descriptor, muted)
    return lambda: _set_mode(descriptor, before)


def _set_mode(descriptor: int, mode: list[Any]) -> None:
    """Does nothing in the background, where the process would be stopped for it."""
    with suppress(OSError, termios.error):
        if os.tcgetpgrp(descriptor) == os.getpgrp():
            termios.tcsetattr(descriptor, termios.TCSANOW, mode)


class ResizableLive(Live):
    """A `Live` that draws a `LiveView`, also in the right place after the terminal has become narrower.

    A terminal wraps the lines that have become too long, and `Live` would go back by fewer rows than they take. A
    terminal that cuts them instead, as xterm does, loses as many rows of what stood above. A terminal that has become
    lower scrolls the first lines away, and gives them back when it is higher again. They are erased then, unless
    something was printed in between.
    """

    def __init__(self, view: LiveView, console: Console) -> None:
        super().__init__(view, console=console, refresh_per_second=4, transient=True)
        self._view = view
        self._scrolled: list[int] = []  # columns of the lines that were scrolled away, from the top
        self._size = console.size
        self._unmute: Callable[[], None] = lambda: None

    def start(self, refresh: bool = False) -> None:
        self._unmute = _mute(self.console.file)
        super().start(refresh)

    def stop(self) -> None:
        super().stop()
        self._unmute()

    def held(self) -> AbstractContextManager[object]:
        """Within it only the caller draws. A print reckons with the rows of the view until it has written its own."""
        return self._lock

    def process_renderables(self, renderables: list[RenderableType]) -> list[RenderableType]:  # type: ignore[override]
        width, height = self.console.size
        drawn = self._view.drawn
        gone = _rows(drawn, width) - height
        for columns in drawn:
            if gone > 0:
                self._scrolled.append(min(columns, gone * width))
                gone -= _rows([columns], width)
        more = _rows(drawn, width) - len(drawn) + _rows(self._scrolled, width)
        if (width, height) != self._size:
            # What can be seen above the view is erased now. The rows below it are blank if it was drawn from the top.
            below = min(self._size.height, height) - len(drawn) if self._scrolled else 0
            seen = height - _rows(drawn, width) - max(0, below)
            while self._scrolled and seen > 0:
                seen -= _rows([self._scrolled.pop()], width)
        if any(not isinstance(renderable, Control) for renderable in renderables):
            self._scrolled.clear()
        self._size = self.console.size
        up = [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)] * more
        back = [Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), *up)] if more else []
        return [*back, *super().process_renderables(renderables)]  # type: ignore[arg-type]
