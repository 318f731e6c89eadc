"""`cda sweep`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from cda_cli.commands.options import JsonOption, SetOption


def sweep(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="YAML with the settings of all runs, arms and seeds (docs/sweeps.md)."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of all its runs.", show_default="runs/NAME of NAME.yaml"),
    ] = None,
    reduced: Annotated[
        bool, typer.Option("--reduced", help="The reduced form that FILE describes, in runs/NAME-reduced.")
    ] = False,
    set_: SetOption = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Runs at once, over all devices.", show_default="1 for each device")
    ] = None,
    devices: Annotated[
        str | None, typer.Option(metavar="cuda:0,cuda:1", help="Devices to spread the runs over.")
    ] = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Train what is missing, or show what is there.")] = True,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the result as Markdown.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it: .png, .svg or .pdf.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Arms × seeds, each an ordinary run in OUT/ARM/seed-N; then tables, with differences to the control by seed.

    The same command goes on where it was stopped, and tries again what failed. What failed stays in the result, and
    the command then exits with 1.
    """
    from cda_cli.console import SweepDisplay, note, print_json, show_sweep, sweep_markdown
    from cda_cli.errors import ConfigError, TrainingError
    from cda_cli.plots import require_plot
    from cda_cli.storage import write_file
    from cda_cli.sweep.files import read_spec
    from cda_cli.sweep.jobs import make_slots
    from cda_cli.sweep.pictures import draw_sweep
    from cda_cli.sweep.plan import Sweep
    from cda_cli.sweep.result import collect
    from cda_cli.sweep.run import check_machine, check_sweep, run_sweep

    if plot:
        require_plot(plot)
    slots = make_slots(jobs, devices)
    if markdown and not markdown.parent.is_dir():
        raise ConfigError(f"--markdown {markdown} has no folder to lie in; make {markdown.parent} first")
    spec = read_spec(file, reduced=reduced, sets=set_ or ())
    planned = Sweep(spec, file, out or Path("runs") / (file.stem + "-reduced" * reduced), reduced)
    if planned.spec.equal == "time" and len(slots) > len({slot.device for slot in slots}):
        raise ConfigError(f"{file} holds time equal, which runs on one device take from each other; leave --jobs out")
    check_sweep(planned)
    if run:
        check_machine(planned, slots)
        for remark in planned.remarks():
            note(remark)
        with SweepDisplay() as display:
            run_sweep(planned, slots, display)
    result = collect(planned, shlex.join(["cda", *sys.argv[1:]]))
    if plot:
        draw_sweep(plot, result)
    if markdown:
        picture = os.path.relpath(plot, markdown.parent) if plot else None
        write_file(markdown, sweep_markdown(result, picture).encode())
    if as_json:
        print_json(result.as_dict())
    else:
        show_sweep(result)
    if failed := result.of_state("failed"):
        raise TrainingError(
            f"{len(failed)} of {len(result.runs)} runs failed, such as {failed[0].folder}; its log says more, and the "
            "same command tries again"
        )
