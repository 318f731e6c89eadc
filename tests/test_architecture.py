"""The shape of the package, read from its source: which way its imports go."""

from __future__ import annotations

import ast
import functools
import graphlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cda_cli"
FILES = sorted(PACKAGE.rglob("*.py"))

# Units of the package, from the top: each imports only from layers below its own. A unit is a folder, or a file that
# lies beside them; "cda_cli" is the package itself, the door for Python.
LAYERS: tuple[set[str], ...] = (
    {"cda_cli"},
    {"__main__"},
    {"main"},
    {"commands"},
    {"inspected_models"},
    {"sparsity_report", "sweep"},
    {"language_model"},
    {"console", "figures", "interchange", "training", "comparison"},
    {"page"},
    {"causal"},
    {"evaluation", "inspection"},
    {"generation"},
    {"restore", "diagnosis", "token_losses", "observed_transformers"},
    {"data", "model", "runs", "plots"},
    {"conditions", "config_views", "storage", "runtime", "signals", "streams", "transformers"},
    {"config"},
    {"settings_table"},
    {
        "ops",
        "errors",
        "plurals",
        "scales",
        "settings",
        "targets",
        "strict_json",
        "strict_yaml",
        "token_labels",
        "version",
    },
)
# What these may import of the package besides themselves, and no more.
ONLY: dict[str, set[str]] = {
    "cda_cli": {"inspected_models", "language_model", "ops", "settings", "sparsity_report", "version"},
    "__main__": {"main"},
    "main": {"version", "commands", "console", "errors", "streams"},
    "console": {"plurals", "runs", "scales", "settings", "settings_table", "strict_json", "token_labels"},
    "diagnosis": {"data", "ops", "runtime"},
    "token_losses": {"data", "runtime"},  # below training and evaluation, which both take their loss from it
    "data": {"config", "errors", "plurals", "settings", "storage", "targets"},
    "model": {"config", "ops", "targets"},
    "runs": {"config", "errors", "plurals", "storage", "strict_json"},
    "config": {"errors", "settings", "settings_table", "strict_yaml"},
    "settings_table": {"settings"},
    "storage": {"errors", "plurals"},
    "runtime": {"errors", "plurals", "settings"},
    "signals": {"errors"},
    "conditions": {"errors"},
    "plots": {"errors", "storage"},
    "page": {"causal", "errors", "inspection", "restore", "storage", "strict_json", "version"},
    "streams": {"errors"},
    "transformers": {"errors", "ops"},
    "observed_transformers": {"errors", "model", "ops", "transformers"},
}
# What these may import from outside, besides the standard library.
OUTSIDE: dict[str, set[str]] = {
    "cda_cli": set(),
    "version": set(),
    "errors": set(),
    "plurals": set(),
    "targets": set(),
    "strict_json": set(),
    "strict_yaml": {"yaml"},
    "signals": set(),
    "streams": set(),
    "config": {"pydantic", "yaml"},
    "settings": {"pydantic"},  # for types and limits; not when it is loaded
    "settings_table": set(),
    "commands": {"typer"},
    "main": {"typer", "rich"},
    "console": {"rich"},
    "runs": set(),
    "conditions": set(),
    "plots": {"matplotlib", "numpy"},
    "figures": {"matplotlib", "torch"},
    "token_labels": set(),
    "scales": set(),
    "page": set(),
    "runtime": {"torch"},
    "storage": {"torch", "safetensors"},
    "interchange": {"torch", "safetensors", "tokenizers", "gguf", "transformers", "huggingface_hub", "yaml"},
    "model": {"torch"},
    "ops": {"torch", "triton", "colt5_attention"},
    "transformers": {"torch", "transformers"},
    "observed_transformers": {"torch", "transformers"},
}
# Who alone may import each of these: a file, or a folder and all below it.
CONFINED: dict[str, set[str]] = {
    "triton": {"cda_cli.ops.triton", "cda_cli.ops.backends.triton_kernels"},
    "cda_cli.ops.triton": {
        "cda_cli.ops.triton",
        "cda_cli.ops.backends.triton_kernels",
        "cda_cli.ops.decoding_step",
        "cda_cli.ops.heads",
        "cda_cli.ops.largest",
        "cda_cli.ops.solvers",
    },
    "colt5_attention": {"cda_cli.ops.backends.colt5"},
    "transformers": {"cda_cli.interchange.hf", "cda_cli.observed_transformers", "cda_cli.transformers"},
    "gguf": {"cda_cli.interchange.gguf_file"},
    "matplotlib": {"cda_cli.plots", "cda_cli.figures", "cda_cli.sparsity_report"},  # the last for a type
    "lm_eval": {"cda_cli.evaluation.tasks"},
}
HEAVY = {"torch", "datasets", "triton", "numpy", "yaml", "pydantic", "einops", "safetensors", "tokenizers", "tqdm"}


class Import(NamedTuple):
    """`module` is dotted and whole; `typing`: under TYPE_CHECKING; `late`: inside a function."""

    module: str
    line: int
    typing: bool
    late: bool


def imports(tree: ast.AST, package: str = "", typing: bool = False, late: bool = False) -> Iterator[Import]:
    """Every import, by its whole name; `from cda_cli import x` is of cda_cli.x where that is a module.

    `package` is the one that holds the file, from which relative imports start.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, typing, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = whole_name(node, package)
            inner = [f"{module}.{alias.name}" for alias in node.names]
            yield from (Import(name if _is_module(name) else module, node.lineno, typing, late) for name in inner)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.body, []), package, True, late)
            yield from imports(ast.Module(node.orelse, []), package, typing, late)
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports(node, package, typing, late or function)


def whole_name(node: ast.ImportFrom, package: str) -> str:
    """The module that a file of `package` imports from. In ops alone imports are relative: it can be lifted out."""
    if not node.level:
        assert node.module is not None
        return node.module
    assert within(package, "cda_cli.ops"), f"line {node.lineno}: a relative import; write the whole name"
    start = package.split(".")[: len(package.split(".")) + 1 - node.level]
    return ".".join([*start, *([node.module] if node.module else [])])


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.startswith("cda_cli.") and (path.with_suffix(".py").is_file() or path.is_dir())


def unit_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parts[:-1])


def source(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@functools.cache
def found_imports() -> list[tuple[Path, str, Import]]:
    pairs = ((path, found) for path in FILES for found in imports(source(path), package_of(path)))
    return [(path.relative_to(ROOT), unit_of(module_of(path)), found) for path, found in pairs]


def layer_of(unit: str) -> int:
    """Counted from the top."""
    return next(index for index, layer in enumerate(LAYERS) if unit in layer)


def runs_back(unit: str, found: Import) -> bool:
    """Whether an import of the package by `unit` is one that the layers do not have."""
    target = unit_of(found.module)
    if target == unit:
        return False
    if unit == "console" and found.typing:
        return False  # a view names the types of what it shows, and imports none of it
    return layer_of(target) <= layer_of(unit) or target not in ONLY.get(unit, {target})


def test_every_unit_has_its_layer() -> None:
    """A new folder or file says where it stands."""
    units = {unit_of(module_of(path)) for path in FILES}
    assert units == set().union(*LAYERS)
    assert sum(len(layer) for layer in LAYERS) == len(units), "a unit stands in two layers"


def test_no_import_runs_back() -> None:
    backward = [
        f"{path}:{found.line} imports {found.module}"
        for path, unit, found in found_imports()
        if unit_of(found.module) in set().union(*LAYERS)
        and found.module.startswith("cda_cli")
        and runs_back(unit, found)
    ]
    assert not backward, "\n".join(backward)


def test_what_is_outside_comes_in_where_it_should() -> None:
    """`config` and `errors` import no torch; `ops` nothing but it, so that it can be lifted out."""
    wrong = [
        f"{path}:{found.line} imports {found.module}"
        for path, unit, found in found_imports()
        if (top := found.module.partition(".")[0]) != "cda_cli"
        and top not in sys.stdlib_module_names
        and top not in OUTSIDE.get(unit, {top})
        and not (unit == "console" and found.typing)
    ]
    assert not wrong, "\n".join(wrong)


def misplaced(module: str, found: Import) -> bool:
    """Whether `module` imports what only some other files may, or something of ops that ops itself does not offer."""
    if within(found.module, "cda_cli.ops") and found.module != "cda_cli.ops" and not within(module, "cda_cli.ops"):
        return True
    places = [files for name, files in CONFINED.items() if within(found.module, name)]
    return any(not any(within(module, place) for place in files) for files in places)


def test_what_few_files_may_import_is_imported_by_these() -> None:
    """colt5-attention and Triton each by its own backend, and of ops nothing but what it offers."""
    wrong = [
        f"{path}:{found.line} imports {found.module}"
        for path, _, found in found_imports()
        if misplaced(module_of(ROOT / path), found)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_ops_can_be_lifted_out(tmp_path: Path) -> None:
    """A copy of the folder, under another name and without the rest of the package, computes the same."""
    shutil.copytree(PACKAGE / "ops", tmp_path / "lifted", ignore=shutil.ignore_patterns("__pycache__"))
    script = (
        "import sys, torch; from lifted import soft_topk, soft_topk_attention; "
        "scores = torch.ones(3, 8); heads = torch.zeros(1, 2, 4, 8); "
        "assert torch.allclose(soft_topk(scores, 2.0), scores / 4); "
        "assert soft_topk_attention(heads, heads, heads, 2.0, solver='iterative').shape == heads.shape; "
        "print(*(name for name in sys.modules if name.startswith('cda_cli')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_no_modules_import_each_other() -> None:
    """Neither units nor, as they are loaded, the files within one."""
    between_units: dict[str, set[str]] = {}
    between_files: dict[str, set[str]] = {}
    for path, unit, found in found_imports():
        if not found.module.startswith("cda_cli") or found.typing:
            continue
        if unit_of(found.module) != unit:
            between_units.setdefault(unit, set()).add(unit_of(found.module))
        if not found.late:
            between_files.setdefault(module_of(ROOT / path), set()).add(found.module)
    for edges in (between_units, between_files):
        order = list(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError, which names the cycle
        assert len(order) > 10


def test_a_command_line_loads_nothing_heavy() -> None:
    """`cda --help` is instant: what is heavy is imported by the command that needs it."""
    script = "import sys; before = set(sys.modules); import cda_cli.main; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "typer" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("module", ["cda_cli.storage", "cda_cli.runs.folder", "cda_cli.console"])
def test_a_runs_folder_is_opened_without_torch(module: str) -> None:
    """`cda train` reads the settings of the run that goes on, and reports a wrong flag before torch is imported."""
    script = f"import sys; import {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {name.partition(".")[0] for name in done.stdout.split()} & {"torch", "numpy"}


@pytest.mark.parametrize(
    ("unit", "code", "backward"),
    [
        ("ops", "import cda_cli.config", True),
        ("ops", "def f():\n    from cda_cli.model import Transformer", True),
        ("storage", "from cda_cli import data", True),
        ("data", "from cda_cli.storage import write_file", False),
        ("data", "from cda_cli.runtime import autocast", True),
        ("evaluation", "from cda_cli.inspection import inspect", True),
        ("training", "from cda_cli.console import table", True),
        ("training", "if TYPE_CHECKING:\n    from cda_cli.console import table", True),
        ("console", "if TYPE_CHECKING:\n    from cda_cli.training.run import Plan", False),
        ("console", "from cda_cli.training.run import Plan", True),
        ("console", "from cda_cli import strict_json", False),
        ("training", "from cda_cli.version import __version__", False),
        ("training", "from cda_cli import load", True),
        ("cda_cli", "def load():\n    from cda_cli.language_model import LanguageModel", False),
    ],
)
def test_the_search_for_arrows_finds_those_that_run_back(unit: str, code: str, backward: bool) -> None:
    assert [runs_back(unit, found) for found in imports(ast.parse(code))] == [backward]


@pytest.mark.parametrize(
    ("package", "code", "module"),
    [
        ("cda_cli.ops", "from .dual import Dual", "cda_cli.ops.dual"),
        ("cda_cli.ops", "from . import dual", "cda_cli.ops.dual"),
        ("cda_cli.ops.triton", "from ..dual import Dual", "cda_cli.ops.dual"),
        ("cda_cli.ops.triton", "def f():\n    from .tiles import rounded", "cda_cli.ops.triton.tiles"),
        ("cda_cli.ops", "from ..config import resolve", "cda_cli.config"),
        ("cda_cli.ops.triton", "from ...model import Transformer", "cda_cli.model"),
    ],
)
def test_the_search_for_imports_follows_relative_ones(package: str, code: str, module: str) -> None:
    (found,) = imports(ast.parse(code), package)
    assert found.module == module
    assert runs_back("ops", found) == (unit_of(module) != "ops")


@pytest.mark.parametrize("package", ["cda_cli", "cda_cli.model", "cda_cli.model.rules", "cda_cli.opsis"])
def test_a_relative_import_elsewhere_is_found(package: str) -> None:
    with pytest.raises(AssertionError, match="write the whole name"):
        list(imports(ast.parse("from .base import AttentionRule"), package))


@pytest.mark.parametrize(
    ("module", "code", "wrong"),
    [
        (
            "cda_cli.model.attention",
            "def f():\n    from cda_cli.ops.triton.heads_launches import norm_and_rotate",
            True,
        ),
        ("cda_cli.model.attention", "from cda_cli.ops.transforms import transformed", True),
        ("cda_cli.model.attention", "from cda_cli.ops import transforms", True),
        ("cda_cli.model.attention", "from cda_cli.ops import norm_and_rotate", False),
        ("cda_cli.ops.dense", "def f():\n    from colt5_attention.coor_descent import coor_descent", True),
        ("cda_cli.ops.backends.colt5", "def f():\n    from colt5_attention.coor_descent import coor_descent", False),
        ("cda_cli.ops.checks", "import triton", True),
        ("cda_cli.ops.checks", "from cda_cli.ops.triton import tiles", True),
        ("cda_cli.ops.triton.tiles", "import triton.language as tl", False),
    ],
)
def test_the_search_for_what_is_misplaced_finds_it(module: str, code: str, wrong: bool) -> None:
    assert [misplaced(module, found) for found in imports(ast.parse(code))] == [wrong]


@pytest.mark.parametrize("folder", ["cda_cli", "tests", "benchmarks"])
def test_files_can_be_read_in_one_sitting(folder: str) -> None:
    """And each is named after what is in it."""
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    others = {PACKAGE / "ops" / "triton": 600, PACKAGE / "commands": 120}  # kernels; what only parses and prints
    limits = {path: next((most for place, most in others.items() if place in path.parents), 400) for path in files}
    long = [str(path) for path, limit in limits.items() if len(path.read_text(encoding="utf-8").splitlines()) >= limit]
    assert not long, f"400 lines or more, or 600 for kernels, or 120 for commands: {', '.join(long)}"
    assert not [path for path in files if path.stem in {"utils", "util", "misc"}]
