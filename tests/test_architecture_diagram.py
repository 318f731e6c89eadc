"""The diagram of docs/architecture.md draws what the code imports."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from tests.test_architecture import LAYERS, found_imports, unit_of, within

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"


def diagram() -> tuple[dict[str, str], dict[str, set[str]]]:
    """The box of each unit in the diagram, and the boxes to which each box has an arrow.

    A unit is a name in a line of a label that holds nothing else but such names.
    """
    drawn = PAGE.read_text(encoding="utf-8").split("```mermaid")[1].split("```")[0]
    units = set().union(*LAYERS)
    lines = [
        (box, line.split(" · "))
        for box, label in re.findall(r'(\w+)\["(.+?)"\]', drawn)
        for line in label.split("<br>")
    ]
    arrows: dict[str, set[str]] = {}
    for start, end in re.findall(r'^ *(\w+)(?:\[".+?"\])? --> (\w+)', drawn, re.MULTILINE):
        arrows.setdefault(start, set()).add(end)
    return {name: box for box, names in lines if units.issuperset(names) for name in names}, arrows


def test_the_diagram_draws_the_imports() -> None:
    """Each arrow is an import, and each import is an arrow or leads along several; types alone do not count."""
    box_of, arrows = diagram()
    assert box_of.keys() == set().union(*LAYERS) - {"__main__"}, "a unit is in no box of docs/architecture.md"
    imported = {
        (box_of[unit], box_of[unit_of(found.module)])
        for _, unit, found in found_imports()
        if within(found.module, "cda_cli") and not found.typing and unit != "__main__"
    }

    @functools.cache
    def below(box: str) -> set[str]:
        return {box}.union(*map(below, arrows.get(box, ())))

    boxes = set(box_of.values())
    drawn = {(start, end) for start, ends in arrows.items() for end in ends if {start, end} <= boxes}
    assert sorted(drawn - imported) == [], "these arrows are no imports"
    undrawn = {(start, end) for start, end in imported if end not in below(start)}
    assert sorted(undrawn) == [], "these imports have no arrow"
