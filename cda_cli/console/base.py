"""The pieces that every view is made of: the console, tables, number formats, progress, JSON."""

from __future__ import annotations

import codecs
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from cda_cli import strict_json

PLAIN_WIDTH = 100  # columns off a terminal
LONGEST_VALUE = 10_000  # columns of a table of pairs there


def out() -> Console:
    """Stdout. Off a terminal lines have a width that reads well everywhere. No markup: a path may hold [brackets]."""
    return Console(highlight=False, markup=False, emoji=False, width=None if is_terminal() else PLAIN_WIDTH)


def is_terminal() -> bool:
    return sys.stdout.isatty()


def is_coloured(console: Console) -> bool:
    """Whether a colour says something there: NO_COLOR, a dumb terminal and a file have none."""
    return console.color_system is not None and not console.no_color


def can_show(text: str) -> bool:
    """Whether the encoding of stdout has all characters of `text`."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def is_live(console: Console) -> bool:
    """Whether it can be drawn on again: a terminal, and not a dumb one.

    What rich reads from the environment (NO_COLOR, FORCE_COLOR, TTY_COMPATIBLE) makes no file a terminal. There it
    decides colour alone.
    """
    return console.file.isatty() and console.is_terminal and console.is_interactive


def shows_progress() -> bool:
    """Whether progress may be drawn on stderr."""
    return is_live(Console(stderr=True))


def print_json(document: Mapping[str, Any]) -> None:
    """Prints one JSON document on stdout, in ASCII if the encoding of stdout may lack a character."""
    print(strict_json.dumps(document, indent=2, ensure_ascii=_lacks_characters()))


def print_json_line(document: Mapping[str, Any]) -> None:
    """Prints a JSON document on a line of its own, which is written at once; in ASCII as `print_json` does."""
    print(strict_json.dumps(document, ensure_ascii=_lacks_characters()), flush=True)


def _lacks_characters() -> bool:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return codecs.lookup(encoding).name != "utf-8"


@contextmanager
def progress(what: str, total: int, quiet: bool = False) -> Iterator[Callable[[int], None]]:
    """Draws a progress bar on stderr, if that is a terminal. Call what it gives with the number that was done."""
    with progress_in_turn(quiet) as begin:
        yield begin(what, total)


@contextmanager
def progress_in_turn(quiet: bool = False) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Draws one progress bar for several works, one after another, on what stderr is now.

    Call what it gives with the name and the total of a work as that begins. It gives what `progress` does.
    """
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Stdout stays itself: what is written there while the bar is drawn may be meant for a pipe.
    off = quiet or not is_live(console)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, disable=off) as bar:
        task = bar.add_task("", total=None, visible=False)

        def begin(what: str, total: int) -> Callable[[int], None]:
            bar.reset(task, description=what, total=total, visible=True)
            return lambda done: bar.advance(task, done)

        yield begin


class Trimmed:
    """A renderable without the spaces at the ends of its lines, with which rich pads every cell of a table.

    It is laid out for `width` columns, or for those of the console.
    """

    def __init__(self, content: RenderableType, width: int | None = None) -> None:
        self.content, self.width = content, width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wanted = options.update_width(self.width) if self.width else options
        for line in console.render_lines(self.content, wanted, pad=False):
            yield from _without_end_spaces(line)
            yield Segment.line()


def _without_end_spaces(line: list[Segment]) -> list[Segment]:
    kept = list(line)
    while kept:
        text, style, control = kept.pop()
        if text.rstrip(" "):
            return [*kept, Segment(text.rstrip(" "), style, control)]
    return kept


def print_trimmed(console: Console, content: RenderableType) -> None:
    console.print(Trimmed(content))


def table(*columns: str, title: str | None = None) -> Table:
    """A plain table: the first column holds text, and the others numbers."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


def print_pairs(console: Console, rows: Mapping[str, str], title: str | None = None) -> None:
    """Prints names and their values. Off a terminal a value stays on its line, so that a path can be cut out of it."""
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows.items():
        made.add_row(name, value)
    width = None if console.file.isatty() else LONGEST_VALUE
    console.print(Trimmed(made, width), soft_wrap=width is not None)


def count(number: float) -> str:
    """1234567 → 1.23 M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.3g}"


def memory(size: float) -> str:
    """Bytes → 512 MiB."""
    for unit, bits in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**bits:
            return f"{size / 2**bits:.3g} {unit}" if size < 999.5 * 2**bits else f"{size / 2**bits:.0f} {unit}"
    return f"{size:.0f} B"


def duration(seconds: float | None) -> str:
    """3725 → 1:02:05."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def share(value: float) -> str:
    return f"{value:.1%}"


def plus_minus(value: float, error: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}" if math.isnan(error) else f"{value:.{digits}f} ± {error:.{digits}f}"
