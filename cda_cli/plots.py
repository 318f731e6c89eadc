"""Pictures of results, by matplotlib, which the extra `plot` brings: styles, the parts of a figure, and its files."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cda_cli.errors import ConfigError
from cda_cli.storage import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito, Color Universal Design, 2008: people with any common colour blindness tell them apart. Yellow, too pale
# for a line on white, is left out. Lines also differ in their markers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREYS = ("#000000", "#777777", "#444444", "#999999", "#222222", "#888888", "#555555")
DASHES = ("-", "--", "-.", ":")
BASE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # Text stays text, as publishers ask for.
    "svg.fonttype": "none",
    "svg.hashsalt": "cda",  # The names of parts would differ from file to file.
}
MOST_NAMED = 6  # layers in a legend
PAGE = 6.75  # inches, the width of a page of two columns in the style of papers
COLUMN = 3.25 / PAGE
DOTS = 300  # per inch, of a picture without lines
MAP_PIXELS = 2700  # across a map that takes the width of a page, two thirds of it itself: 600 per inch of paper


def _settings(font: float, ink: str, paper: str, grid: str, stroke: float = 1.0) -> dict[str, Any]:
    """Settings of matplotlib for a font of `font` points, and lines that are `stroke` times as wide as in a paper."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    papers = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    widths = {"axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7, "grid.linewidth": 0.5}
    return {
        **BASE,
        "font.size": font,
        "legend.fontsize": 0.9 * font,
        "axes.labelsize": font,
        "grid.color": grid,
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(papers, paper),
        **{name: stroke * width for name, width in widths.items()},
    }


@dataclass(frozen=True)
class Style:
    """How figures look. `page` is the width of a wide one in inches, and `stroke` that of lines against a paper's.

    `colours` and `dashes` tell lines apart that have no order; `colormap` orders layers, and colours the cells of maps.
    """

    settings: Mapping[str, Any]
    page: float = PAGE
    stroke: float = 1.0
    colours: Sequence[str] = COLOURS
    dashes: Sequence[str] = DASHES[:1]
    colormap: str = "cividis"
    ends: tuple[float, float] = (0.0, 0.9)  # the part of the colormap that is seen as a line
    faint: str = "#666666"


STYLES: dict[str, Style] = {
    "paper": Style(_settings(8, "#000000", "#ffffff", "#dddddd")),
    "slides": Style(_settings(16, "#000000", "#ffffff", "#dddddd", 2), page=12.8, stroke=2),
    "dark": Style(
        _settings(12, "#e8e8e8", "#16181d", "#3a3d45", 1.4),
        page=10,
        stroke=1.4,
        colours=("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#ffffff"),
        ends=(0.25, 1.0),
        faint="#9a9a9a",
    ),
    "mono": Style(
        _settings(8, "#000000", "#ffffff", "#dddddd"),
        colours=GREYS,
        dashes=DASHES,
        colormap="Greys",
        ends=(0.4, 1.0),
    ),
}


class Point(NamedTuple):
    """A value with its interval, which is NaN where there is none."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


def require_matplotlib(option: str) -> None:
    """Raises ConfigError, before anything is computed, if the pictures of `option` cannot be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{option} needs matplotlib; pip install 'cda-cli[plot]'") from error


def require_plot(path: Path) -> None:
    """Raises ConfigError, before anything is computed, if no picture can be drawn into the file `path`."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {path} is no picture; end its name with {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path} has no folder to lie in; make {path.parent} first")
    require_matplotlib("--plot")


@contextmanager
def styled(style: Style) -> Iterator[None]:
    """Within it, figures are made and saved in a style."""
    import matplotlib as mpl

    with mpl.rc_context(dict(style.settings)):
        yield


def new_figure(style: Style, width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Makes a figure of `rows` × `columns` axes. `width` and `height` are parts of the width of a page.

    The width is 1 or COLUMN, so that a paper need not scale the figure, and with it the size of its letters.
    """
    from matplotlib.figure import Figure

    figure = Figure((style.page * width, style.page * height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_line(axes: Axes, style: Style, number: int, name: str, points: Sequence[Point]) -> None:
    """Draws the line `number` of several without an order, with its intervals as a band.

    A style has few colours, and begins them again with other dashes.
    """
    x, y, low, high = zip(*sorted(points), strict=True)
    rounds, place = divmod(number, len(style.colours))
    colour = style.colours[place]
    dash = style.dashes[number % len(style.dashes)] if len(style.dashes) > 1 else DASHES[rounds % len(DASHES)]
    marker = MARKERS[number % len(MARKERS)]
    size = 3.5 * style.stroke
    axes.plot(x, y, dash, color=colour, marker=marker, markersize=size, linewidth=1.2 * style.stroke, label=name)
    if not any(map(math.isnan, low + high)):
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)


def draw_layers(axes: Axes, style: Style, lines: Mapping[int, Sequence[Point]]) -> None:
    """Draws a line for each layer, in the order of the colours of a map, and of dashes where a style has them."""
    for place, (layer, points) in enumerate(lines.items()):
        x, y, _, _ = zip(*points, strict=True)
        colour, dash = _ordered(style, place / max(1, len(lines) - 1)), style.dashes[place % len(style.dashes)]
        axes.plot(x, y, dash, color=colour, linewidth=1.1 * style.stroke, label=f"layer {layer}")


def add_legend(figure: Figure, axes: Axes, style: Style) -> None:
    """Says what the lines of `axes` are: beside them, or above where the figure is no wider than a column."""
    lines, names = axes.get_legend_handles_labels()
    if figure.get_figwidth() > style.page * COLUMN:
        figure.legend(lines, names, loc="outside right upper")
    else:
        columns = 2 if max(map(len, names)) > 10 or len(names) == 4 else 3
        figure.legend(lines, names, loc="outside upper center", ncols=columns, columnspacing=1, handlelength=1.6)


def name_layers(figure: Figure, axes: Sequence[Axes], style: Style, layers: Sequence[int]) -> None:
    """Says which line of `draw_layers` is which layer: in a legend, or for many of them by a scale of colours."""
    if len(layers) <= MOST_NAMED:
        add_legend(figure, axes[0], style)
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

    colours = ListedColormap([_ordered(style, place / (len(layers) - 1)) for place in range(len(layers))])
    norm = BoundaryNorm([layer - 0.5 for layer in (*layers, layers[-1] + 1)], len(layers))
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(axes), label="layer")
    bar.set_ticks([layers[0], layers[len(layers) // 2], layers[-1]])
    bar.minorticks_off()


def _ordered(style: Style, place: float) -> Any:
    import matplotlib as mpl

    first, last = style.ends
    return mpl.colormaps[style.colormap](first + (last - first) * place)


def draw_map(
    axes: Axes,
    style: Style,
    width: float,
    values: Sequence[Sequence[float]],
    ends: tuple[float, float] | None = None,
) -> ScalarMappable:
    """Draws a matrix, its first row at the top, and returns what `draw_scale` takes.

    `width` is the part of the width of a page that the map takes with its labels and its scale. With `ends`, these are
    the first and the last colour, and the colours go by the square root of what lies above the first, so that small
    values differ. NaN is a gap. The cells are one image, as they would otherwise be thousands of shapes with seams
    between them. Its pixels divide the cells, so no format draws it anew.
    """
    import matplotlib as mpl
    import numpy as np
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize, PowerNorm

    cells = np.ma.masked_invalid(np.asarray(values, dtype=float))
    norm = PowerNorm(0.5, *ends) if ends else Normalize(cells.min(), cells.max())
    drawn = ScalarMappable(norm, mpl.colormaps[style.colormap])
    rows, columns = cells.shape
    pixels = math.ceil(MAP_PIXELS * width / columns)
    image = drawn.to_rgba(cells, bytes=True).repeat(pixels, 0).repeat(pixels, 1)
    axes.imshow(image, aspect="auto", interpolation="none", extent=(0, columns, rows, 0))
    axes.grid(False)
    return drawn


def draw_scale(figure: Figure, axes: Axes, drawn: ScalarMappable, label: str = "", shrink: float = 1.0) -> None:
    """Draws the scale of the colours of a map beside it, in steps that are too small to be seen."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(drawn.norm, drawn.cmap.resampled(64)), ax=axes, label=label, shrink=shrink)
    assert bar.solids is not None
    bar.solids.set(rasterized=False, edgecolor="face")


def draw_curves(
    figure: Figure,
    axes: Axes,
    style: Style,
    lines: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    zero: str | None = None,
    linear_below: float | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Draws lines over numbers that double, each with its intervals, and the line y = 0, if it is called `zero`.

    The y axis is linear, or logarithmic above `linear_below` and linear between that and its negative. It has the
    `limits`.
    """
    if linear_below is not None:
        axes.set_yscale("symlog", linthresh=linear_below)
    if limits is not None:
        axes.set_ylim(*limits)
    if zero is not None:
        axes.axhline(0, color=style.faint, linewidth=0.8 * style.stroke, linestyle="--", label=zero)
    for number, (name, points) in enumerate(lines.items()):
        draw_line(axes, style, number, name, points)
    doubling_axis(axes, sorted({point.x for points in lines.values() for point in points}))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    add_legend(figure, axes, style)


def plain_log_axis(axes: Axes) -> None:
    """Makes the y axis a logarithmic one whose numbers are written out."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.minorticks_off()


def doubling_axis(axes: Axes, numbers: Sequence[float]) -> None:
    """Makes the x axis one of numbers that double, and names them."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(numbers), [f"{x:g}" for x in numbers])
    axes.minorticks_off()


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
    """Draws lines into the file `path`, as `draw_curves` does."""
    style = STYLES["paper"]
    with styled(style):
        figure, (axes,) = new_figure(style, 1, 0.6)
        draw_curves(figure, axes, style, lines, x_label, y_label, zero, linear_below, limits)
        save(figure, path)


def drawable(text: str) -> str:
    """`text` with U+FFFD for each character that the font of the figures lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else "\N{REPLACEMENT CHARACTER}" for c in text)


def save(figure: Figure, path: Path, title: str = "", description: str = "") -> None:
    """Writes a figure whole or not at all, in the format of the file's ending. The same figure gives the same bytes.

    `title` and `description` are kept in the file.
    """
    kind = path.suffix.lower()
    named = {
        ".png": {"Title": title, "Description": description},
        ".svg": {"Title": title, "Description": description, "Date": None},
        ".pdf": {"Title": title, "Subject": description, "CreationDate": None},
    }[kind]
    content = io.BytesIO()
    figure.savefig(content, format=kind[1:], dpi=DOTS, metadata=named)
    write_file(path, content.getvalue())
