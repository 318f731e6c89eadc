"""Lines over x: as characters in a terminal, and as SVG in a page. Each line has a letter, which is also its mark."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from typing import NamedTuple

from rich.text import Text

XY = tuple[float, float]
COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")  # of the lines, in their order
BOTH = "*"  # where two lines share a place
HEIGHT = 13  # rows of characters
SIZE = (640.0, 280.0)  # of the SVG
MARGINS = (64.0, 24.0, 16.0, 44.0)  # left, right, top, bottom
MARK = 13.0  # the height of a letter
HIGHEST = 0.9  # The y axis ends at this quantile: the losses of the first steps would leave the others no height.


class Chart(NamedTuple):
    """`lines` by their letters: the points of each, with a growing x. `x_words` and `y_words` write numbers of an axis.

    With `is_log` the x axis is logarithmic.
    """

    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[XY]]
    x_words: Callable[[float], str]
    y_words: Callable[[float], str]
    is_log: bool = False
    whole: bool = False  # the y axis takes every point

    @property
    def drawn(self) -> dict[str, list[XY]]:
        """The points that are finite, on a linear scale."""
        scale = math.log if self.is_log else float
        return {
            letter: [(scale(x), y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
            for letter, points in self.lines.items()
        }

    @property
    def limits(self) -> tuple[XY, XY] | None:
        """The ends of both axes, or None where there is no point."""
        points = [point for line in self.drawn.values() for point in line]
        if not points:
            return None
        x, y = (sorted(values) for values in zip(*points, strict=True))
        top = y[-1] if self.whole else y[math.ceil(HIGHEST * (len(y) - 1))]
        return (x[0], _above(x[0], x[-1])), (y[0], _above(y[0], top))

    def shown_x(self, x: float) -> str:
        """What stands below the axis at a place on its linear scale."""
        return self.x_words(math.exp(x) if self.is_log else x)


def _above(low: float, high: float) -> float:
    return high if high > low else low + max(1e-6, abs(low) * 0.01)


def draw_text(chart: Chart, width: int) -> Text:
    """Draws a chart in at most `width` columns. Its axes are plain characters, which every terminal shows."""
    limits = chart.limits
    if limits is None:
        return Text("no figures")
    (left, right), (low, high) = limits
    labels = [chart.y_words(high + (low - high) * row / (HEIGHT - 1)) for row in range(HEIGHT)]
    margin = max(map(len, labels))
    columns = max(2, width - margin - 2)
    grid: list[list[tuple[str, str]]] = [[(" ", "")] * columns for _ in range(HEIGHT)]
    for colour, (letter, points) in zip(COLOURS, chart.drawn.items(), strict=False):
        for column in range(columns):
            y = _between(points, left + (right - left) * column / (columns - 1))
            if y is not None:
                row = HEIGHT - 1 - round((min(max(y, low), high) - low) / (high - low) * (HEIGHT - 1))
                is_free = grid[row][column][0] == " "
                grid[row][column] = (letter, colour) if is_free else (BOTH, "bold")
    drawn = Text(f"{chart.y_label}\n", no_wrap=True, overflow="crop")
    for number, cells in enumerate(grid):
        is_labelled = number % ((HEIGHT - 1) // 2) == 0
        drawn.append(f"{labels[number] if is_labelled else '':>{margin}} |")
        for character, colour in cells:
            drawn.append(character, style=colour)
        drawn.append("\n")
    drawn.append(" " * margin + " +" + "-" * columns + "\n")
    first, last = chart.shown_x(left), chart.shown_x(right)
    gap = max(0, columns - len(first) - len(last))
    return drawn.append(" " * (margin + 2) + first + f"{chart.x_label:^{gap}}" + last)


def _between(points: Sequence[XY], x: float) -> float | None:
    """The y of a line at `x`, or None outside of it."""
    places = [place for place, _ in points]
    after = bisect_right(places, x)
    if not points or x < places[0] or x > places[-1]:
        return None
    if after == len(points):
        return points[-1][1]
    (x0, y0), (x1, y1) = points[after - 1 : after + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def draw_svg(chart: Chart, title: str) -> str:
    """Draws a chart as an SVG element, whose colours are those of the page. `title` is what a screen reader says."""
    limits = chart.limits
    if limits is None:
        return "<p>no figures</p>"
    (left, right), (low, high) = limits
    before, after, above, below = MARGINS
    width, height = SIZE[0] - before - after, SIZE[1] - above - below

    def place(point: XY) -> XY:
        x, y = point
        return before + (x - left) / (right - left) * width, above + (high - y) / (high - low) * height

    lines = chart.drawn
    clip = f"clip-{re.sub('[^a-z0-9]+', '-', title.lower())}"
    drawn = [
        f'<polyline class="line{number}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))}"/>'
        for number, points in enumerate(lines.values(), start=1)
    ]
    ends = {letter: place((points[-1][0], min(points[-1][1], high))) for letter, points in lines.items() if points}
    return "\n".join(
        [
            f'<svg viewBox="0 0 {SIZE[0]:g} {SIZE[1]:g}" role="img" aria-label="{escape(title)}">',
            f"<title>{escape(title)}</title>",
            *_axes(chart, limits, place),
            f'<clipPath id="{clip}">',
            f'<rect x="0" y="{above - 2:g}" width="{SIZE[0]:g}" height="{height + 4:g}"/></clipPath>',
            f'<g clip-path="url(#{clip})">',
            *drawn,
            "</g>",
            *_marks(list(lines), ends),
            "</svg>",
        ]
    )


def _axes(chart: Chart, limits: tuple[XY, XY], place: Callable[[XY], XY]) -> Iterator[str]:
    """Yields the elements of the grid, the numbers beside it and the name of the x axis."""
    (left, right), (low, high) = limits
    for step in range(5):
        y = low + (high - low) * step / 4
        (start, at), (end, _) = place((left, y)), place((right, y))
        yield f'<line class="grid" x1="{start:.1f}" x2="{end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{start - 8:.1f}" y="{at + 4:.1f}" text-anchor="end">{escape(chart.y_words(y))}</text>'
    for step in range(5):
        x = left + (right - left) * step / 4
        at, floor = place((x, low))
        anchor = ("start", "middle", "middle", "middle", "end")[step]
        yield f'<text x="{at:.1f}" y="{floor + 18:.1f}" text-anchor="{anchor}">{escape(chart.shown_x(x))}</text>'
    middle, floor = place(((left + right) / 2, low))
    yield f'<text x="{middle:.1f}" y="{floor + 38:.1f}" text-anchor="middle">{escape(chart.x_label)}</text>'


def _marks(letters: Sequence[str], ends: Mapping[str, XY]) -> Iterator[str]:
    """Yields the letter of each line, beside its end. Letters of lines that end together stand above each other."""
    marks: list[XY] = []
    for letter, (x, y) in sorted(ends.items(), key=lambda end: -end[1][1]):
        at = min([y + 4, *(other - MARK for start, other in marks if abs(start - x) < MARK)])
        marks.append((x, at))
        number = letters.index(letter) + 1
        yield f'<text class="mark line{number}" x="{x + 5:.1f}" y="{at:.1f}">{escape(letter)}</text>'
