"""The Typer app: registers the commands, and turns a CdaError into one sentence and an exit code."""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from cda_cli.commands import (
    bench_decode,
    compare,
    config,
    doctor,
    eval,
    export,
    import_model,
    inspect_sparsity,
    presets,
    runs,
    sample,
    sweep,
    train,
)
from cda_cli.commands.usage import Command, Group
from cda_cli.errors import MEMORY_USED_UP, CdaError, InterruptedRunError, exit_code
from cda_cli.streams import open_streams
from cda_cli.version import __version__

app = typer.Typer(
    name="cda",
    cls=Group,
    help="Train, evaluate, sample from and inspect Transformers that select with coordinate-descent sparsity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "eval": eval.evaluate,
    "sample": sample.sample,
    "bench-decode": bench_decode.bench_decode,
    "import": import_model.import_model,
    "inspect-sparsity": inspect_sparsity.inspect_sparsity,
    "compare": compare.compare,
    "sweep": sweep.sweep,
    "export": export.export,
    "runs": runs.runs,
    "config": config.config,
    "presets": presets.presets,
    "doctor": doctor.doctor,
}
for name, command in COMMANDS.items():
    # Each paragraph as one line, which the help wraps at the width of the terminal.
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    app.command(name, cls=Command, help="\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))(command)


class GlobalOptions:
    """The object of Typer's context: the options of `cda` that `run` must know when a command has failed."""

    def __init__(self) -> None:
        self.debug = False


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cda {__version__}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    context.ensure_object(GlobalOptions).debug = debug


def run() -> None:
    """The console script `cda`."""
    # torch reads this when it is imported. On a busy machine, threads that spin while they wait for each other keep the
    # cores from those that they wait for, and each wait lasts a time slice or more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    open_streams()
    with contextlib.suppress(AttributeError):  # Windows has no SIGQUIT.
        # A stop waits for the step in hand. Where that never ends, Ctrl-\ says where it stands.
        faulthandler.register(signal.SIGQUIT, file=2, chain=True)
    options = GlobalOptions()
    try:
        try:
            app(obj=options, prog_name="cda")
        finally:
            sys.stdout.flush()  # a failure to write is reported here, not by the interpreter as it ends
    except Exception as error:
        if options.debug:
            traceback.print_exception(error)
        else:
            _explain(error)
        raise SystemExit(exit_code(error)) from error


def _explain(error: Exception) -> None:
    """Explains an error in one sentence on stderr."""
    if isinstance(error, CdaError):
        if str(error):
            _print_error(str(error), "" if isinstance(error, InterruptedRunError) else "error: ")
    elif isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        _print_error(
            f"the {MEMORY_USED_UP}; use a smaller --batch-size (in training with a larger --grad-accum), or a smaller "
            "--seq-len"
        )
    elif type(error).__name__ == "OutOfMemoryError":
        _print_error(
            f"the GPU's {MEMORY_USED_UP}; use a smaller --batch-size with a larger --grad-accum (with --parallel fsdp "
            "one that divides the number of processes, or more processes), or, of a run with CUDA graphs, --set "
            "run.cuda_graphs=false, so that validation can have the memory of a step"
        )
    elif isinstance(error, OSError) and error.filename:
        _print_error(f"{error.filename}: {error.strerror}; check the path and the space and rights there")
    else:
        _print_error(
            f"unexpected {type(error).__name__}: {error} (a fault of cda: run `cda --debug …` for the traceback)"
        )


def _print_error(sentence: str, label: str = "error: ") -> None:
    from rich.console import Console
    from rich.text import Text

    from cda_cli.console.text import print_sentence

    print_sentence(Console(stderr=True), Text.assemble((label, "bold red"), sentence))
