"""Options made from the table of settings: their names, help, defaults and completion."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from cda_cli.commands.completion import setting_completion
from cda_cli.settings_table import TABLE, Row, as_written, with_values

PANELS = {"run": "Run", "data": "Data", "optim": "Optimisation", "model": "Model"}  # in the order of the help


def with_setting_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command` an option for each setting that has a flag, in place of its parameter `flags`.

    `command` receives `flags` as `config.resolve` takes them: values by dotted key, None where a flag is not given.
    Numbers arrive as text, as the configuration reads them: 1e3 steps are a thousand.
    """
    by_name: dict[str, list[Row]] = {}
    for section in PANELS:
        for row in TABLE.values():
            if row.section == section and row.setting.flag:
                by_name.setdefault(row.setting.parameter, []).append(row)

    @functools.wraps(command)
    def with_flags(**given: Any) -> None:
        flags = {row.key: given[name] for name, rows in by_name.items() for row in rows}
        command(**{name: value for name, value in given.items() if name not in by_name}, flags=flags)

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "flags"]
    made = [_parameter(name, rows[0]) for name, rows in by_name.items()]
    with_flags.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
    return with_flags


def setting_option(key: str, also: str = "") -> Any:
    """The option of a command that knows the setting `key` without a configuration; its help ends with `also`."""
    row = TABLE[key]
    help = f"{row.meaning.removesuffix('.')}; {also}." if also else row.meaning
    return typer.Option(row.setting.flag, help=help, autocompletion=setting_completion(row))


def _parameter(name: str, row: Row) -> inspect.Parameter:
    """The parameter from which Typer makes the option of a setting. It is None where the option is not given."""
    option = typer.Option(
        *filter(None, (row.setting.flag, row.setting.short)),
        help=with_values(row.setting.flag_help or row.setting.help, row.values),
        show_default=_default_shown(row),
        metavar="INTEGER" if int in row.kinds else "FLOAT" if float in row.kinds else None,
        autocompletion=setting_completion(row),
        rich_help_panel=PANELS[row.section],
    )
    annotation: Any = Annotated[bool | None if bool in row.kinds else str | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _default_shown(row: Row) -> str | bool:
    """The default as the help shows it; False where the help says in words what happens without a value."""
    if row.setting.by_preset:
        return "by preset"
    if row.default in (None, []):
        return False
    if isinstance(row.default, bool):
        on, off = row.setting.flag.split("/")
        return (on if row.default else off).removeprefix("--")
    return as_written(row.default)
