"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from cda_cli.commands.completion import complete_checkpoint, completion
from cda_cli.commands.setting_flags import PANELS, setting_option
from cda_cli.settings import DEFAULT_PRESET, Side, preset_names
from cda_cli.settings_table import TABLE, with_values

SIDES = get_args(Side)

PresetOption = Annotated[
    str | None,
    typer.Option(
        "--preset",
        "-p",
        help=with_values("Named starting point.", preset_names()).removesuffix(".") + "; see `cda presets`.",
        show_default=DEFAULT_PRESET,
        autocompletion=completion(preset_names()),
        rich_help_panel=PANELS["run"],
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="YAML with the sections model, data, optim, run.", rich_help_panel=PANELS["run"]),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Any setting; see `cda config`.",
        autocompletion=completion([f"{key}=" for key in TABLE]),
        rich_help_panel=PANELS["run"],
    ),
]
CheckpointArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT|RUN",
        help="A checkpoint folder, or a run: then its newest checkpoint.",
        autocompletion=complete_checkpoint,
    ),
]
BestOption = Annotated[
    bool, typer.Option("--best", help="Of a run: the checkpoint with the lowest validation loss, not the newest.")
]
EmaOption = Annotated[
    bool, typer.Option("--ema", help="The moving average of the weights, of a run with optim.ema_decay.")
]
DataOption = Annotated[str | None, setting_option("data.source", also="the run's own where not given")]
EncodingOption = Annotated[
    str | None,
    setting_option("data.encoding", also="where not given, the run's for its own text, and utf-8 for another"),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split",
        help=with_values("Part of the text, as in training.", SIDES).removesuffix(".")
        + "; where not given, validation of the run's own text, and all of another.",
        autocompletion=completion(SIDES),
    ),
]
DeviceOption = Annotated[str, setting_option("run.device")]
DtypeOption = Annotated[str, setting_option("run.dtype")]
BackendOption = Annotated[str, setting_option("run.backend")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; words go to stderr.")]
