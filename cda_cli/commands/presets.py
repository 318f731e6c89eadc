"""`cda presets`."""

from __future__ import annotations

from typing import Annotated

import typer

from cda_cli.commands.completion import completion
from cda_cli.commands.options import JsonOption
from cda_cli.settings import preset_names


def presets(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A preset, to print as YAML.", autocompletion=completion(preset_names())),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The named starting points: their shape and their purpose, or the YAML of one of them."""
    from cda_cli.config import preset_file, preset_purpose, resolve
    from cda_cli.console import print_json, show_presets

    if name and not as_json:
        print(preset_file(name).read_text(encoding="utf-8"), end="")
        return
    names = [name] if name else preset_names()
    found = {each: (resolve(each), *preset_purpose(each)) for each in names}
    if as_json:
        print_json({
            each: {"parameters": parameters, "purpose": purpose, "config": config.model_dump()}
            for each, (config, parameters, purpose) in found.items()
        })  # fmt: skip
    else:
        show_presets(found)
