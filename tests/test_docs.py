"""The docs keep to the code: generated pages are current, every command and file is documented, the walks of
docs/architecture.md and the recipes of CONTRIBUTING.md name what exists, and a measured figure stands once."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cda_cli.config import resolve
from tests.commands.helpers import COMMANDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_generated_pages_are_current() -> None:
    pages = runpy.run_path(str(ROOT / "docs" / "generate.py"))["pages"]()
    old = [name for name, text in pages.items() if (ROOT / "docs" / name).read_text(encoding="utf-8") != text]
    assert not old, f"run `make docs`, which changes {', '.join(old)}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_documented(command: str) -> None:
    assert f"cda {command}" in README, f"the README does not show cda {command}"
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert f"## `cda {command}`" in page, f"docs/cli.md has no section on cda {command}: run `make docs`"


def test_every_file_is_listed() -> None:
    """A newcomer finds each file of the package in docs/architecture.md, under its own name, and none that has gone."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`(\w+\.py)`", page[page.index("## Files") :]))
    files = {path.name for path in (ROOT / "cda_cli").rglob("*.py") if path.name != "__init__.py"}
    assert listed == files


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
RUNS = sorted(path for path in RESULTS.glob("*.md") if path.name != "README.md")
CELL = re.compile(r"(?<!\\)\|")  # the sign before a cell, and after the last one
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
TO_MAKE = "NAME"  # in the name of a file that a recipe has one make


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_rows_of_a_table_have_the_cells_of_its_head(page: Path) -> None:
    """A cell with |x| in it would end there, and the rest of it would not be shown."""
    cells = None
    for line in FENCED.sub("", page.read_text(encoding="utf-8")).splitlines():
        found = len(CELL.findall(line)) if line.startswith("|") else None
        assert None in (cells, found) or cells == found, f"write \\| within a cell of {line}"
        cells = found


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def references(page: str) -> Iterator[tuple[str, str | None]]:
    """The files and folders that `page` names in backticks, each with the function, class or constant after a colon."""
    folders = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."))
    for span in re.findall(r"`([^`]+)`", FENCED.sub("", page)):
        words = " ".join(span.split())
        if found := re.fullmatch(rf"((?:{folders})/[\w./-]*|[\w.-]+\.(?:py|md|toml|txt))(?:::?\s*([\w.]+))?", words):
            yield found[1], found[2]


def names_in(tree: ast.AST, prefix: str = "") -> Iterator[str]:
    """Functions, classes, constants and fields of a module; those of a class under its name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + node.name
        elif isinstance(node, ast.ClassDef):
            yield prefix + node.name
            yield from names_in(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign):
            yield from (prefix + target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield prefix + node.target.id


def is_missing(path: str, function: str | None) -> bool:
    file = ROOT / path
    if TO_MAKE in file.stem:
        return not file.parent.is_dir()
    if function is None:
        return not file.exists()
    return not file.is_file() or function not in names_in(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_and_functions_that_a_page_names_exist(page: str) -> None:
    """The list of files is by folder, and has a test of its own."""
    text, _, _ = (ROOT / page).read_text(encoding="utf-8").partition("\n## Files\n")
    named = list(references(text))
    missing = [f"{path}: {function or ''}" for path, function in named if is_missing(path, function)]
    assert len(named) > 20, f"{page} names hardly any file: the search finds no references"
    assert not missing, f"{page} names what is not there; correct it: " + ", ".join(missing)


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`cda_cli/training/loop.py: train`", False),
        ("`cda_cli/training/loop.py::train`", False),
        ("`cda_cli/training/loop.py:\n  train`", False),
        ("`cda_cli/training/loop.py: walk`", True),
        ("`cda_cli/data/prefetch.py: Prefetched.__next__`", False),
        ("`cda_cli/data/prefetch.py: __next__`", True),
        ("`cda_cli/data/row_readers.py: READERS`", False),
        ("`cda_cli/settings/model.py: ModelSettings.attention`", False),
        ("`cda_cli/nothing.py`", True),
        ("`cda_cli/nothing/`", True),
        ("`cda_cli/commands/NAME.py`", False),
        ("`tests/ops/test_NAME.py`", False),
        ("`cda_cli/nothing/NAME.py`", True),
    ],
)
def test_the_search_for_names_finds_those_that_are_missing(text: str, missing: bool) -> None:
    assert [is_missing(*found) for found in references(text)] == [missing]


def shown_commands(page: str) -> Iterator[list[str]]:
    """The words of each call of `cda` in the blocks of shell of `page`, without pipes and files behind it."""
    for block in re.findall(r"^ *```(?:sh|console)\n(.*?)^ *```", page, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"(?:.*[|$] )?cda ([a-z].*)", line.strip()):
                words = shlex.split(found[1], comments=True)
                yield words[: next((place for place, word in enumerate(words) if word in ("|", ">", "<")), None)]


def test_every_command_that_the_docs_show_can_be_given() -> None:
    """Its options exist and take such values, and so do the settings of a training."""
    shown = [words for page in PAGES if page.name != "cli.md" for words in shown_commands(page.read_text("utf-8"))]
    for name, *words in shown:
        given = COMMANDS[name].make_context(name, list(words)).params
        if name == "train":
            resolve(given["preset"], sets=given["set_"] or (), flags={"run.init_from": given["init_from"]})
    assert len(shown) > 80, "the search finds hardly any command"


def heading_anchors(page: Path) -> set[str]:
    """As GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, RESULTS / "README.md", *RUNS], ids=page_name)
def test_rows_of_a_table_have_the_cells_of_its_head(page: Path) -> None:
    """A plain | in a row ends its cell, and what lies beyond the head is not shown."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    wrong = []
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, *rows = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        wrong += [row for row, cells in zip(table.splitlines()[1:], rows, strict=True) if cells != head]
    assert not wrong, f"{page_name(page)} has rows with too few or too many cells: {wrong[0]}"


@pytest.mark.parametrize("page", [*PAGES, RESULTS / "README.md", *RUNS], ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in heading_anchors(target)):
            dead.append(link)
    assert not dead, f"{page_name(page)} links to what is not there: {', '.join(dead)}"


@pytest.mark.parametrize("page", RUNS, ids=page_name)
def test_a_run_says_where_its_figures_come_from(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    said = dict(re.findall(r"^- (\w+): (.+)$", text.partition("\n|")[0], re.MULTILINE))
    assert list(said)[:5] == ["date", "machine", "versions", "commit", "command"], (
        f"{page_name(page)} says only {list(said)}"
    )
    assert page.name.startswith(said["date"][:10]), f"{page_name(page)} is not named after its date, {said['date']}"
    assert page.name in (RESULTS / "README.md").read_text(encoding="utf-8"), f"the index leaves {page.name} out"


def figures(text: str) -> list[str]:
    """Numbers with three significant digits and a decimal point, which hardly agree by chance."""
    found = re.findall(r"(?<![\w.,/-])\d+\.\d+(?![\w.])", text)
    return [number for number in found if len(number.replace(".", "").lstrip("0")) >= 3]


def test_a_measured_figure_is_quoted_once() -> None:
    """The tables are in benchmarks/results; the log and the table of make reliability have figures of their own."""
    own = {"log.md", "reliability.md", "cli.md", "configuration.md"}
    measured = {figure for page in RUNS for figure in figures(page.read_text(encoding="utf-8"))}
    quoted = Counter(
        figure
        for page in PAGES
        if page.name not in own
        for figure in figures(FENCED.sub("", page.read_text(encoding="utf-8")))
    )
    twice = [figure for figure, count in quoted.items() if count > 1 and figure in measured]
    assert len(measured) > 300
    assert not twice, f"quoted more than once in README.md and docs; link to the table instead: {', '.join(twice)}"
