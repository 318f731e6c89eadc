"""`cda runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cda_cli.commands.options import JsonOption


def runs(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER", help="Runs, or folders that hold runs.", show_default="runs"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """A table of runs, the best first: how far each came, its losses, and the settings in which they differ.

    The curve is the validation loss over the steps, or the training loss of a run that has hardly any validations.
    What is missing or damaged is told below its run, as far as the names and sizes of the files show it.
    """
    from cda_cli.console import print_json, show_runs
    from cda_cli.runs.summary import differing_settings, summarise_all

    found, problems = summarise_all(folders or [Path("runs")])
    differing = differing_settings(found)
    if as_json:
        listed = [run._asdict() | {"path": str(run.path)} for run in found]
        sentences = {str(path): problem for path, problem in problems.items()}
        print_json({"runs": listed, "differing": differing, "problems": sentences})
    else:
        show_runs(found, differing, problems)
