"""No file that the package reads can make it run code: what could is not in its source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.test_architecture import FILES, ROOT, imports, package_of, source

PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FUNCTIONS = {"eval", "exec", "__import__", "compile"}
ATTRIBUTES = {
    ("torch", "load"),
    ("torch.jit", "load"),
    ("torch.hub", "load"),
    ("torch.serialization", "load"),
    ("yaml", "load"),
    ("yaml", "load_all"),
    ("yaml", "full_load"),
    ("yaml", "unsafe_load"),
    ("yaml", "Loader"),
    ("yaml", "FullLoader"),
    ("yaml", "UnsafeLoader"),
    ("runpy", "run_path"),
    ("runpy", "run_module"),
    ("pkgutil", "resolve_name"),
}


KEYWORDS = {"allow_pickle", "trust_remote_code"}


def dangers(tree: ast.Module, package: str = "") -> list[str]:
    """What could run code, or import a module, that a file names."""
    named = imports(tree, package)
    found = [f"{one.line}: imports {one.module}" for one in named if one.module.partition(".")[0] in PICKLES]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names if (node.module, alias.name) in ATTRIBUTES]
            found += [f"{node.lineno}: imports {node.module}.{name}" for name in names]
        if isinstance(node, ast.Attribute) and (ast.unparse(node.value), node.attr) in ATTRIBUTES:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in FUNCTIONS:
            found.append(f"{node.lineno}: {called}()")
        if called.rpartition(".")[2] == "import_module" and not isinstance(node.args[0], ast.Constant):
            found.append(f"{node.lineno}: imports a module by a name that is no literal")
        found += [f"{node.lineno}: {word.arg}" for word in node.keywords if word.arg in KEYWORDS]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_can_make_the_package_run_code(path: Path) -> None:
    """A checkpoint or a configuration from a stranger is data, and stays data."""
    assert dangers(source(path), package_of(path)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "read = torch.load",
        "yaml.load(text, yaml.Loader)",
        "from yaml import unsafe_load",
        "class Mine(yaml.FullLoader): ...",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
        "importlib.import_module(name)",
        "import_module(f'x.{name}')",
        "np.load(path, allow_pickle=True)",
        "torch.jit.load(path)",
        "from runpy import run_module",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_the_search_for_dangers_finds_them(code: str) -> None:
    assert dangers(ast.parse(code))


@pytest.mark.parametrize(
    "code", ["model.eval()", "yaml.safe_load(text)", "importlib.import_module('json')", "storage.load(path)"]
)
def test_the_search_for_dangers_lets_the_harmless_be(code: str) -> None:
    assert not dangers(ast.parse(code))
