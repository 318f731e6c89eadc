"""`cda inspect-sparsity --html`: the page of a run, within its budget."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.commands.helpers import Cda, assert_refused


def document(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)
    assert found
    parsed = json.loads(found[1])
    assert isinstance(parsed, dict)
    return parsed


def test_the_page_of_a_run(cda: Cda, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "report.html"
    options = ("--max-batches", 2, "--causal", "--ablate", "heads", "--budget", "400kB", "--html", path)
    result = cda("inspect-sparsity", finished, "--json", *options)
    assert result.code == 0, result.err
    assert result.err.startswith(f"wrote {path}, 0.")
    assert path.stat().st_size <= 400_000
    page = path.read_text(encoding="utf-8")
    found, printed = document(page), json.loads(result.out)
    assert "<title>What run selects</title>" in page
    assert f"text {printed['data']}, {printed['split']} · inspected 64 tokens in 2 windows" in page
    assert len(found["labels"]) == found["rows"]["queries"] == 32
    assert [(cut["name"], cut["difference"]) for cut in found["causal"]["cuts"]] == [
        (cut["name"], cut["difference"]) for cut in printed["causal"]["cuts"]
    ]
    for head, expected in zip(found["heads"], printed["heads"], strict=True):
        assert head["keys_95"] == pytest.approx(expected["keys_95"], rel=1e-4)
    assert [head["ablation_difference"] for head in found["heads"]] == pytest.approx(
        [each["difference"] for each in printed["causal"]["ablations"]]
    )
    assert found["live"] == {f"{layer}.{head}": 16 for layer in range(2) for head in range(2)}


def test_the_page_has_the_heads_that_are_chosen(cda: Cda, finished: Path, tmp_path: Path) -> None:
    """They have the whole budget, in which all heads would have no room."""
    path = tmp_path / "report.html"
    page = ("--max-batches", 1, "--html", path, "--budget", "145kB")
    assert_refused(cda("inspect-sparsity", finished, *page), "give a larger --budget")
    assert cda("inspect-sparsity", finished, *page, "--heads", 1).code == 0
    assert path.stat().st_size <= 145_000
    found = document(path.read_text(encoding="utf-8"))
    assert [(head["layer"], head["head"]) for head in found["heads"]] == [(0, 1), (1, 1)]
    assert [(head["layer"], head["head"]) for head in found["rows"]["heads"]] == [(0, 1), (1, 1)]
    assert set(found["live"]) == {"0.1", "1.1"}


def test_what_is_no_page_is_refused_before_anything_is_computed(cda: Cda, finished: Path, tmp_path: Path) -> None:
    assert_refused(cda("inspect-sparsity", finished, "--html", tmp_path / "report.pdf"), "ends with .html")
    assert_refused(cda("inspect-sparsity", finished, "--budget", "3MB"), "add --html FILE")
    assert_refused(cda("inspect-sparsity", finished, "--figure-style", "dark"), "add --figures DIR")
    assert_refused(cda("inspect-sparsity", finished, "--html", tmp_path), "ends with .html")
    page = ("--html", tmp_path / "report.html")
    assert_refused(cda("inspect-sparsity", finished, *page, "--budget", "much"), "is no size")
    assert_refused(cda("inspect-sparsity", finished, *page, "--budget", "100kB"), "give a larger --budget")
    assert not (tmp_path / "report.html").exists()
