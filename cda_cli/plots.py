"""Pictures of results, by matplotlib, which the extra `plot` brings."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cda_cli.errors import ConfigError
from cda_cli.storage import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito, Color Universal Design, 2008: people with any common colour blindness tell them apart. Yellow, too pale
# for a line on white, is left out. Lines also differ in their markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # Text stays text, as publishers ask for.
    "svg.fonttype": "none",
}
SIZE = (6.75, 4.0)  # inches: the width of a page of two columns
DOTS = 300  # per inch, of a PNG


class Point(NamedTuple):
    """A value with its interval, which is NaN where there is none."""

    x: float
    y: float
    low: float
    high: float


def require_plot(path: Path) -> None:
    """Raises ConfigError, before anything is computed, if no picture can be drawn into the file `path`."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path} is no picture; end its name with {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path} has no folder to lie in; make {path.parent} first")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib; pip install 'cda-cli[plot]'") from error


def plot_lines(
    path: Path,
    lines: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    *,
    zero: str | None = None,
    linear_below: float | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draws lines over numbers that double, each with its intervals, and the line y = 0, if it is called `zero`.

    The y axis is linear, or logarithmic above `linear_below` and linear between that and its negative. It has the
    `limits`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(SIZE, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log", base=2)
        if linear_below is not None:
            axes.set_yscale("symlog", linthresh=linear_below)
        if limits is not None:
            axes.set_ylim(*limits)
        if zero is not None:
            axes.axhline(0, color="#666666", linewidth=0.8, linestyle="--", label=zero)
        for number, (name, points) in enumerate(lines.items()):
            _draw(axes, name, points, COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
        numbers = sorted({point.x for points in lines.values() for point in points})
        axes.set_xticks(numbers, [f"{x:g}" for x in numbers])
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        figure.legend(loc="outside right upper")
        save(figure, path)


def _draw(axes: Axes, name: str, points: Sequence[Point], colour: str, marker: str) -> None:
    x, y, low, high = zip(*sorted(points), strict=True)
    axes.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.4, label=name)
    if not any(map(math.isnan, low + high)):
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure whole or not at all, in the format of the file's ending."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=DOTS)
    write_file(path, content.getvalue())
