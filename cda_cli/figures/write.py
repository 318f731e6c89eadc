"""The figures by their names, and the files of each: its numbers, its caption with the command, and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cda_cli.errors import ConfigError, DataError, did_you_mean
from cda_cli.figures.ablation import Ablated, ablated_rows, draw_ablated
from cda_cli.figures.csv_rows import from_csv, to_csv
from cda_cli.figures.lines import (
    AtDistance,
    AtPosition,
    AtStep,
    Kept,
    UnitQuantile,
    distance_rows,
    draw_distances,
    draw_kept,
    draw_positions,
    draw_training,
    draw_units,
    kept_rows,
    position_rows,
    training_rows,
    unit_rows,
)
from cda_cli.figures.maps import OfHead, Weight, draw_heads, draw_weights, head_rows, weight_rows
from cda_cli.figures.material import Material
from cda_cli.plots import FORMATS, STYLES, Style, require_matplotlib, save, styled
from cda_cli.plurals import counted
from cda_cli.storage import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FigureKind:
    """A figure: its rows from what was measured, which are none where it was not, and the picture of these rows.

    `caption` says what it shows, and `missing` how its rows come about.
    """

    row: type[Any]
    rows: Callable[[Material], list[Any]]
    draw: Callable[..., Figure]
    caption: str
    missing: str = ""


FIGURES: dict[str, FigureKind] = {
    "loss-against-keys": FigureKind(
        Kept,
        kept_rows,
        draw_kept,
        "Bits per byte more than with all keys, with so many keys for each query: those with the largest weights (top) "
        "and controls. Bands are 95 % bootstrap intervals over windows, paired.",
        "--causal measures it",
    ),
    "heads": FigureKind(OfHead, head_rows, draw_heads, "Measures of each head, the means over all rows."),
    "positions": FigureKind(
        AtPosition,
        position_rows,
        draw_positions,
        "Means over queries that see about as many keys, for each head: the median of the heads, and the bands from 5 "
        "to 95 % and from 25 to 75 % of them.",
    ),
    "head-map": FigureKind(
        Weight,
        weight_rows,
        draw_weights,
        "The weights λ of one head over the beginning of the text. Circles mark capped keys, whose weight is 1.",
    ),
    "distances": FigureKind(
        AtDistance,
        distance_rows,
        draw_distances,
        "The share of the mass at each distance, the mean over the heads of a layer.",
    ),
    "ablation": FigureKind(
        Ablated,
        ablated_rows,
        draw_ablated,
        "Each measure of a head against the bits per byte that it costs to replace its output by the mean; bars are "
        "standard errors over windows.",
        "--ablate heads measures it",
    ),
    "training": FigureKind(
        AtStep,
        training_rows,
        draw_training,
        "The loss, and means over the heads of each layer, over the steps of the training.",
        "it takes a checkpoint in the folder of its run, with two records of training or more",
    ),
    "units": FigureKind(
        UnitQuantile,
        unit_rows,
        draw_units,
        "How often each unit of the feed-forward is in use, which means that it is one of the fewest that make 99 % of "
        "what the units of a token add to the residual stream, by length.",
    ),
}


class Written(NamedTuple):
    """The names of the figures that were written, and of those that were not, each with what it takes."""

    folder: Path
    names: list[str]
    missing: dict[str, str]

    @property
    def words(self) -> str:
        left_out = [f"{name} is left out ({why})" for name, why in self.missing.items()]
        return "; ".join([f"wrote {counted(len(self.names), 'figure')} into {self.folder}", *left_out])


def require_figures(folder: Path, styles: Sequence[str]) -> None:
    """Raises ConfigError, before anything is computed, if figures cannot be written there or have no such style."""
    for style in styles:
        _style(style)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give --figures the name of a folder")
    require_matplotlib("--figures")


def write_figures(
    folder: Path,
    material: Material,
    styles: Sequence[str],
    command: str,
    advance: Callable[[int], None] = lambda figures: None,
) -> Written:
    """Writes NAME.csv, NAME.txt and STYLE/NAME.pdf, .svg and .png into `folder` for each figure.

    `command` makes the figures again. `advance` gets 1 for each figure. A figure whose rows were not measured is left
    out.
    """
    written = Written(folder, [], {})
    for name, kind in FIGURES.items():
        if rows := kind.rows(material):
            written.names.append(name)
            caption = f"{kind.caption} {material.source}"
            write_file(folder / f"{name}.csv", to_csv(rows).encode())
            write_file(folder / f"{name}.txt", f"{caption}\n\n{command}\n".encode())
            for style in styles:
                figure = _drawn(kind, STYLES[style], rows)
                with styled(STYLES[style]):
                    for ending in FORMATS:
                        save(figure, folder / style / f"{name}{ending}", name, f"{caption} {command}")
        else:
            written.missing[name] = kind.missing
        advance(1)
    return written


def draw(name: str, material: Material, style: str = "paper") -> Figure:
    """Draws the figure of that name.

    Raises ConfigError for another name or style, for a figure whose rows were not measured, and without matplotlib.
    """
    kind, look = _kind(name), _style(style)
    require_matplotlib("a figure")
    rows = kind.rows(material)
    if not rows:
        raise ConfigError(f"the figure {name} has nothing to show here{'; ' if kind.missing else ''}{kind.missing}")
    return _drawn(kind, look, rows)


def redraw(file: Path, style: str = "paper") -> Figure:
    """Draws a figure from the CSV file that `write_figures` wrote, for further changes by matplotlib.

    Raises ConfigError for a file of another name, and without matplotlib, and DataError for a file that is not there or
    is not such a file.
    """
    file = Path(file)
    kind, look = _kind(file.stem), _style(style)
    require_matplotlib("a figure")
    try:
        # In bytes, since opening it as text would change the ends of lines, which may be tokens.
        content = file.read_bytes().decode()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); give a file that --figures wrote") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8; give a file that --figures wrote") from error
    return _drawn(kind, look, from_csv(content, kind.row))


def _kind(name: str) -> FigureKind:
    if name not in FIGURES:
        raise ConfigError(f"there is no figure {name!r}: {did_you_mean(name, FIGURES)}")
    return FIGURES[name]


def _style(name: str) -> Style:
    if name not in STYLES:
        raise ConfigError(f"there is no style {name!r} of figures: {did_you_mean(name, STYLES)}")
    return STYLES[name]


def _drawn(kind: FigureKind, style: Style, rows: Sequence[Any]) -> Figure:
    with styled(style):
        figure = kind.draw(style, rows)
        # Laid out once, it is the same in each format, and takes half the time.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure
