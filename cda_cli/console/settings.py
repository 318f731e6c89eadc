"""The settings, with where their values come from, and the presets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from cda_cli.console.base import out, print_pairs, print_trimmed, table
from cda_cli.console.text import print_sentence, printable
from cda_cli.plurals import counted
from cda_cli.settings import SECTIONS
from cda_cli.settings_table import as_written

if TYPE_CHECKING:
    from cda_cli.config import Config
    from cda_cli.config_views import Explained

INDENT = "    "


def show_settings(settings: Sequence[Explained], preset: str, run: Path | None = None) -> None:
    """Writes each setting with its value, its origin and its meaning.

    The values are compared with those of `preset`; `run` is the run that has them, if they are those of one.
    """
    console = out()
    changed = sum(each.value != each.presets[preset] for each in settings)
    if run:
        words = f"differs from preset {preset} in {counted(changed, 'setting')}"
        print_sentence(console, f"{printable(str(run))} {words}", style="bold")
    for section, own in itertools.groupby(settings, lambda each: each.row.section):
        if run or section != settings[0].row.section:
            console.print()
        console.print(Text(f"{section}: {SECTIONS[section].__doc__}", style="bold"))
        for each in own:
            console.print(_setting_line(each, preset))
            for line in Text(_setting_words(each)).wrap(console, console.width - len(INDENT)):
                console.print(INDENT + line.plain.rstrip())


def show_changed(settings: Sequence[Explained], preset: str, run: Path | None = None) -> None:
    """A table of settings that differ from those of `preset`: their values there, and where their own come from."""
    console = out()
    if run:
        console.print(Text(printable(str(run)), style="bold"))
    if not settings:
        console.print(f"all settings are those of preset {preset}")
        return
    made = table("setting", "value", f"preset {preset}", "from")
    for column in made.columns:
        column.justify, column.overflow = "left", "fold"
    made.columns[0].no_wrap = True
    for each in settings:
        values = (printable(as_written(value)) for value in (each.value, each.presets[preset]))
        made.add_row(each.row.key, *values, each.origin)
    print_trimmed(console, made)


def _setting_line(each: Explained, preset: str) -> Text:
    differs = each.value != each.presets[preset]
    origin = f"{each.origin}; preset {preset} has {as_written(each.presets[preset])}" if differs else each.origin
    value = printable(as_written(each.value))
    return Text.assemble(
        (each.row.key, "bold"), " = ", (value, "yellow" if differs else ""), (f"  ({origin})", "dim"), overflow="fold"
    )


def _setting_words(each: Explained) -> str:
    flags = ", ".join(filter(None, (each.row.setting.short, each.row.setting.flag.replace("/", ", "))))
    words = f"{each.row.setting.help} Allowed: {each.row.allowed}. Default: {default_words(each.presets)}."
    return f"{words} Flag: {flags}." if flags else words


def default_words(presets: Mapping[str, object]) -> str:
    """The default of a setting: one value, or that of each preset where they differ."""
    written = {name: as_written(value) for name, value in presets.items()}
    if len(set(written.values())) == 1:
        return next(iter(written.values()))
    return ", ".join(f"{name} {value}" for name, value in written.items())


def show_presets(presets: Mapping[str, tuple[Config, str, str]]) -> None:
    """Each preset with its configuration, its number of parameters, and its purpose; the smallest model first."""
    console = out()
    by_size = sorted(presets.items(), key=lambda item: item[1][0].model.dim ** 2 * item[1][0].model.depth)
    made = table("preset", "parameters", "shape", "heads", "context", "batch", "attention", "k", "ε")
    made.columns[6].justify = "left"
    for name, (config, parameters, _) in by_size:
        model, optim = config.model, config.optim
        made.add_row(
            name,
            parameters,
            f"{model.depth}×{model.dim}",
            str(model.heads),
            str(model.seq_len),
            f"{optim.batch_size}×{optim.grad_accum}" if optim.grad_accum > 1 else str(optim.batch_size),
            model.attention,
            f"{'≤ ' * model.learned_k}{as_written(model.attn_k)}",
            as_written(model.attn_eps),
        )
    print_trimmed(console, made)
    console.print()
    print_pairs(console, {name: f"{purpose[0].upper()}{purpose[1:]}" for name, (_, _, purpose) in by_size})
