"""The modules of the page's script fit together, so that they can be joined into one."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import cda_cli
from cda_cli.page.page import SCRIPTS, joined_script
from cda_cli.scales import LINEAR_BELOW

FOLDER = Path(cda_cli.__file__).parent / "page" / "scripts"
MODULES = {name: (FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS}
DECLARATION = r"^(export )?(?:async )?(?:function|class|const|let) (?:(\w+)|\[([\w, ]+)\])"


def declared(module: str, exported: bool = False) -> list[str]:
    """The names that a module declares outside of functions, or those that it exports."""
    return [
        name
        for export, single, several in re.findall(DECLARATION, MODULES[module], re.MULTILINE)
        if export or not exported
        for name in (single or several).split(", ")
    ]


def imported(module: str) -> dict[str, list[str]]:
    """The names that a module imports, by the module that they come from."""
    found = re.findall(r'^import \{([^}]+)\} from "\./(\w+)\.js";$', MODULES[module], re.MULTILINE)
    return {source: re.findall(r"\w+", names) for names, source in found}


def test_every_module_is_joined() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(SCRIPTS)
    assert not re.search(r"^(import|export)\b", joined_script(), re.MULTILINE)


@pytest.mark.parametrize("module", SCRIPTS)
def test_a_module_imports_what_an_earlier_one_exports(module: str) -> None:
    for source, names in imported(module).items():
        assert SCRIPTS.index(source) < SCRIPTS.index(module), f"{source} is joined after {module}"
        assert set(names) <= set(declared(source, exported=True))
    bodies = re.sub(r"^import [^;]*;\n", "", MODULES[module], flags=re.MULTILINE)
    names = [name for of_source in imported(module).values() for name in of_source]
    assert not [name for name in names if not re.search(rf"\b{name}\b", bodies)], "imported and not used"


def test_no_name_is_given_twice_and_none_in_vain() -> None:
    names = Counter(name for module in SCRIPTS for name in declared(module))
    assert not [name for name, times in names.items() if times > 1]
    used = Counter(re.findall(r"\w+", joined_script()))
    assert not [name for name in names if used[name] < 2], "declared and not used"
    exports = {name for module in SCRIPTS for name in declared(module, exported=True)}
    imports = {name for module in SCRIPTS for of_source in imported(module).values() for name in of_source}
    assert exports == imports


def test_lines_are_short() -> None:
    for path in (*FOLDER.iterdir(), FOLDER.parent / "style.css", Path(__file__).with_name("walk.js")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) <= 120, path
        assert len(lines) < 500, path


def test_the_axis_of_differences_is_that_of_other_charts() -> None:
    assert f"const LINEAR_BELOW = {LINEAR_BELOW};" in MODULES["overview"]
