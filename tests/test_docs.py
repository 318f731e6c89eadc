"""The docs keep to the code: generated pages are current, and the README names every command and file."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["cli.md", "configuration.md"])
def test_generated_pages_are_current(name: str) -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == pages[name], f"docs/{name} is old: run `make docs`"


@pytest.mark.parametrize("command", ["train", "eval", "sample", "inspect-sparsity", "doctor"])
def test_the_readme_shows_every_command(command: str) -> None:
    assert f"cda {command}" in README


def test_the_readme_names_every_file() -> None:
    """A newcomer finds each file of the package in the layout table, under its own name."""
    files = [path for path in (ROOT / "cda_cli").rglob("*.py") if path.name != "__init__.py"]
    unnamed = [str(path.relative_to(ROOT)) for path in files if path.name not in README]
    assert not unnamed


def test_every_setting_says_what_it_means() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert not [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
