"""`cda config`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cda_cli.commands.completion import complete_setting
from cda_cli.commands.options import ConfigOption, JsonOption, PresetOption, SetOption
from cda_cli.commands.setting_flags import with_setting_flags
from cda_cli.settings import SECTIONS
from cda_cli.settings_table import TABLE, find_settings

if TYPE_CHECKING:
    from cda_cli.config import Config


@with_setting_flags
def config(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|WORD",
            help="A run or a checkpoint; sections of the settings, or words to look for in them.",
            autocompletion=complete_setting,
        ),
    ] = None,
    preset: PresetOption = None,
    file: ConfigOption = None,
    set_: SetOption = None,
    changed: Annotated[bool, typer.Option("--changed", help="A short table of what differs from the preset.")] = False,
    as_yaml: Annotated[bool, typer.Option("--yaml", help="YAML, which --config reads back.")] = False,
    as_json: JsonOption = False,
    schema: Annotated[bool, typer.Option("--schema", help="The JSON Schema of a file for --config.")] = False,
    *,
    flags: Mapping[str, object],
) -> None:
    """Every setting: value, where that comes from, what is allowed, default in each preset, meaning.

    It takes the options of `cda train`, and shows what these would train with. With a run or a checkpoint it shows the
    settings of that, and how they differ from --preset, or from the preset that it began from.
    """
    from cda_cli.config import preset_file, preset_of, resolve_with_origins
    from cda_cli.config_views import annotated_yaml, explain, json_schema
    from cda_cli.console import print_json, show_changed, show_settings
    from cda_cli.errors import ConfigError
    from cda_cli.runs.folder import config_of_weights

    if as_yaml + as_json + schema > 1:
        raise ConfigError("--yaml, --json and --schema exclude each other; give one of them")
    if schema:
        print_json(json_schema())
        return
    run, base, words = _split(words or [])
    if run and file:
        raise ConfigError(f"the settings of {run} and of {file} exclude each other; give one of them")
    keys = _keys(words)
    resolved = resolve_with_origins(None if run else preset, file, set_ or (), flags, base, config_of_weights)
    start = preset or preset_of(resolved.config)
    preset_file(start)  # refuses a name that is no preset
    settings = [each for each in explain(resolved) if each.row.key in keys]
    if changed:
        settings = [each for each in settings if each.value != each.presets[start]]
    if as_yaml:
        print(annotated_yaml(resolved, {each.row.key for each in settings}), end="")
    elif as_json:
        print_json({"run": run and str(run), "preset": start, "settings": [each.as_dict() for each in settings]})
    else:
        (show_changed if changed else show_settings)(settings, start, run)


def _split(words: list[str]) -> tuple[Path | None, Config | None, list[str]]:
    """The run or checkpoint among the arguments, its settings, and the other arguments."""
    from cda_cli.errors import ConfigError
    from cda_cli.runs.folder import config_of

    found = [(Path(word), config_of(Path(word))) for word in words if Path(word).is_dir()]
    runs = [(path, config) for path, config in found if config is not None]
    if len(runs) > 1:
        raise ConfigError(f"{runs[0][0]} and {runs[1][0]} are two runs; give one, or compare them with `cda runs`")
    others = [word for word in words if Path(word) not in [path for path, _ in runs]]
    paths = [word for word in others if "/" in word]
    if paths:
        raise ConfigError(f"{paths[0]} is no run and no checkpoint; give a folder that `cda train` wrote")
    return *(runs[0] if runs else (None, None)), others


def _keys(words: list[str]) -> set[str]:
    """The keys of the settings that the words name, or of all where there are no words."""
    from cda_cli.errors import ConfigError, did_you_mean

    found = {word: find_settings(word) for word in words}
    for word, rows in found.items():
        if not rows:
            names = {*SECTIONS, *TABLE, *(row.name for row in TABLE.values())}
            near = did_you_mean(word, names, "`cda config` shows all")
            raise ConfigError(f"no setting has {word!r} in its name or meaning: {near}")
    return {row.key for rows in found.values() for row in rows} if words else set(TABLE)
