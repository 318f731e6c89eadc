"""The Python lines of the README and of docs/python.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run_lines(page: str, run: Path) -> dict[str, Any]:
    """Runs the Python lines of a page, with `run` in place of runs/first, and returns the names that they set."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    assert "runs/first" in blocks[0]
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("runs/first", str(run)), names)
    return names


def test_the_python_lines_of_the_readme_run(finished: Path) -> None:
    names = run_lines("README.md", finished)
    assert names["logits"].shape == (6, 256)
    assert names["nats"] < 0
    assert names["text"]


def test_the_lines_of_the_page_on_python_run(finished: Path) -> None:
    names = run_lines("docs/python.md", finished)
    assert names["logits"].shape == (6, 256)
    assert names["nats"] < names["choices"][" be"] < 0
    assert names["tokens"].tolist() == list(b"ROMEO:")
    assert names["parameters"] > 1000
    assert len(names["heads"]) == len(names["change"]) == 4
    assert names["row"].weights.sum() + names["row"].rest == pytest.approx(names["row"].sparsity_k, rel=0.02)
    assert names["weights"].sum().item() == pytest.approx(2)
    assert names["weights"].max().item() <= 1
