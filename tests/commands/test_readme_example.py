"""The Python lines of the README run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_the_python_lines_of_the_readme_run(finished: Path) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    assert "runs/first" in found[1]
    names: dict[str, Any] = {}
    exec(found[1].replace("runs/first", str(finished)), names)
    assert names["weights"].sum().item() == pytest.approx(2)
    assert names["weights"].max().item() <= 1
    assert names["logits"].shape[:2] == (1, 6)
