"""What the tests of the commands share: a tiny run's settings, and commands called in this process."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import typer.core
import typer.main

import cda_cli
from cda_cli.main import app, run

# Typer makes the same tree of commands anew in each call, which takes longer than what most of these tests call.
typer.main.get_command = functools.cache(typer.main.get_command)
COMMANDS: dict[str, typer.core.TyperCommand] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

TINY = """\
model:
  seq_len: 32
  dim: 32
  depth: 2
  heads: 2
  null_kv: 1
  attn_k: 3.0
optim:
  steps: 6
  batch_size: 4
  warmup_steps: 2
run:
  log_every: 1
  eval_every: 3
  eval_batches: 2
  save_every: 2
  device: cpu
"""

WITH_DEVICE = ("train", "eval", "compare", "sample", "bench-decode", "inspect-sparsity")

# Weights that grow by 27 orders of magnitude in the first step: the second one overflows.
OVERFLOWING = ("--set", "optim.weight_decay=1e30")


class Result(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


Cda = Callable[..., Result]


def on_cpu(*args: object) -> list[str]:
    """The same arguments with `--device cpu`, where they choose no device: the tests then say the same whether or not
    there is a GPU."""
    given = list(map(str, args))
    if given and given[0] in WITH_DEVICE and "--device" not in given:
        given[1:1] = ["--device", "cpu"]
    return given


def run_cda(*args: object, stdin: bytes | None = None) -> Result:
    """`cda ARGS` in this process, off a terminal, and on the CPU; `stdin` is what it would read there."""
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, sys.stdin)
    sys.argv = ["cda", *on_cpu(*args)]
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin or b""))
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run()
    except SystemExit as leaving:
        code = leaving.code or 0
    finally:
        sys.argv, sys.stdin = before
    return Result(code, out.getvalue(), err.getvalue())


def in_subprocess(*args: object) -> list[str]:
    """The command line of `cda ARGS` in an interpreter of its own, on the CPU."""
    return [sys.executable, "-m", "cda_cli", *on_cpu(*args)]


def real_text(size: int = 12_000) -> str:
    """Prose and code that people wrote: the source of this package."""
    folder = Path(cda_cli.__file__).parent
    return "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))[:size]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every name below `folder`, with the bytes of the files: two of these are equal only if nothing changed."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def metrics(run_folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run, or those of one kind."""
    lines = (run_folder / "metrics.jsonl").read_bytes().splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if kind in (None, record["kind"])]


def steps_saved(run_folder: Path) -> list[int]:
    """The steps of a run's checkpoints; anything else in their folder is an error."""
    return sorted(int(path.name.removeprefix("step-")) for path in (run_folder / "checkpoints").iterdir())


def assert_refused(result: Result, *words: str, code: int = 2) -> None:
    """One sentence on stderr that holds `words`, no traceback, nothing on stdout but plain progress."""
    assert result.code == code, f"exit code {result.code}, not {code}: {result.err}"
    assert result.err.startswith("error: "), result.err
    assert result.err.count("\n") == 1, f"more than one line: {result.err}"
    assert "Traceback" not in result.err
    assert "unexpected" not in result.err, f"not understood: {result.err}"
    for word in words:
        assert word in result.err, f"{word!r} is not in: {result.err}"


def escapes(text: str) -> list[str]:
    """The control characters of a text that could steer a terminal."""
    return re.findall(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def environment(**changes: str) -> Mapping[str, str]:
    """This process's environment, with changes."""
    return {**os.environ, **changes}
