"""Charts: as characters within the width, and as SVG that a browser can read."""

from __future__ import annotations

import io
import math
from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cda_cli.console.charts import BOTH, HEIGHT, XY, Chart, draw_svg, draw_text

POINTS = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=6).map(lambda ys: list(enumerate(ys, start=1)))


def chart(lines: dict[str, list[XY]], is_log: bool = False) -> Chart:
    return Chart("tokens", "bits", lines, lambda x: f"{x:.0f}", lambda y: f"{y:.3g}", is_log)


def drawn(lines: dict[str, list[XY]], width: int = 60) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(draw_text(chart(lines), width))
    return file.getvalue().split("\n")[:-1]


def test_lines_stand_where_their_figures_are() -> None:
    """A falls from the highest to the lowest place, and B stays at the lowest, where both end."""
    heading, *rows, axis, below = drawn({"A": [(0.0, 2.0), (50.0, 1.0)], "B": [(0.0, 1.0), (50.0, 1.0)]})
    assert heading == "bits"
    assert len(rows) == HEIGHT
    assert rows[0].startswith("   1 |") or rows[0].startswith("   2 |")
    assert rows[-1].startswith("   1 |BBB")
    assert rows[-1].endswith(BOTH)
    assert "A" not in rows[-1]
    assert set(axis.strip()) == {"+", "-"}
    assert below.split() == ["0", "tokens", "50"]


@given(a=POINTS, b=POINTS, width=st.integers(1, 100), is_log=st.booleans())
def test_any_figures_can_be_drawn(a: list[XY], b: list[XY], width: int, is_log: bool) -> None:
    assert max(map(len, drawn({"A": a, "B": b}, width))) <= width
    svg = ElementTree.fromstring(draw_svg(chart({"A": a, "B": b}, is_log), "<losses> & more"))
    numbers = [float(n) for line in svg.iter("polyline") for n in line.attrib["points"].replace(",", " ").split()]
    assert all(map(math.isfinite, numbers))


def test_each_line_of_an_svg_has_its_letter() -> None:
    lines = {"A": [(0.0, 1.0), (1.0, 1.0)], "B": [(0.0, 1.0), (1.0, 1.0)], "C": []}
    svg = ElementTree.fromstring(draw_svg(chart(lines), "losses"))
    marks = [(each.text, float(each.attrib["y"])) for each in svg.iter("text") if "mark" in each.get("class", "")]
    assert [letter for letter, _ in marks] == ["A", "B"]
    assert abs(marks[1][1] - marks[0][1]) >= 12, "letters lie on each other where lines end together"
