"""`cda train`."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from typer import Option

from cda_cli.commands.completion import complete_resume
from cda_cli.commands.options import ConfigOption, PresetOption, SetOption
from cda_cli.commands.setting_flags import PANELS, with_setting_flags
from cda_cli.settings import DEFAULT_PRESET

RUN = PANELS["run"]


@with_setting_flags
def train(
    preset: PresetOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    out: Annotated[
        Path | None,
        Option(
            "--out", "-o", help="Run folder.", show_default="the run of --resume, or runs/PRESET", rich_help_panel=RUN
        ),
    ] = None,
    resume: Annotated[
        str,
        Option(
            metavar="auto|never|PATH",
            help="What to go on from; PATH is a checkpoint or a run.",
            autocompletion=complete_resume,
            rich_help_panel=RUN,
        ),
    ] = "auto",
    dry_run: Annotated[
        bool, Option("--dry-run", help="Build all, forecast memory, try a batch, print the plan.", rich_help_panel=RUN)
    ] = False,
    devices: Annotated[int, Option(min=1, help="Processes to start here, a GPU each.", rich_help_panel=RUN)] = 1,
    *,
    flags: Mapping[str, object],
) -> None:
    """Train a model; the same command again goes on from its newest checkpoint.

    Settings: preset, then those of --init-from, then --config, then --set, then flags, the later winning; so does the
    later of two --set.
    `cda config` describes each setting, and says where its value would come from.
    """
    from cda_cli.config import resolve
    from cda_cli.runs.folder import Run, config_of_weights, config_to_resume, run_to_resume
    from cda_cli.signals import StopRequest
    from cda_cli.training.distributed.launch import STOPPED_BEFORE_START, ErrorCoordinator, count_processes, launch

    of_preset = Path("runs") / (preset or (config.stem if config else DEFAULT_PRESET))
    run = Run(out or run_to_resume(resume) or of_preset)
    # A wrong setting is refused before torch is imported.
    with ErrorCoordinator() as coordinator, StopRequest() as stop:
        base = config_to_resume(run.path, resume)
        initial = functools.partial(config_of_weights, base=base)
        settings = resolve(preset, config, set_ or (), flags, base, initial)
        if (processes := count_processes(settings, coordinator.place, devices, dry_run)) > coordinator.place.processes:
            sys.exit(launch(processes, stop))
        from cda_cli.console import TrainingDisplay, show_dry_run, show_forecast
        from cda_cli.training.display import NullDisplay

        display: TrainingDisplay | NullDisplay = NullDisplay()
        if coordinator.place.rank == 0:
            display = TrainingDisplay()
            stop.answer = display.stopping
        with stop.at_once(STOPPED_BEFORE_START), display.busy(f"starting {run.path}"):
            from cda_cli.training import run as training
            from cda_cli.training.distributed.processes import join

        with join(coordinator, settings) as joined:
            if dry_run:
                show_dry_run(training.dry_run(settings, run, resume, display, stop, show_forecast))
            else:
                training.run_training(settings, run, resume, display, stop, joined)
