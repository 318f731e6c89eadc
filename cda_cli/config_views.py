"""A configuration as people and programs are shown it: setting by setting, as annotated YAML, and as a JSON Schema."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import yaml

from cda_cli.config import Config, Resolved, flat, preset_values
from cda_cli.settings import SECTIONS, preset_names
from cda_cli.settings_table import TABLE, Row


class Explained(NamedTuple):
    """A setting: its row of the table, its value, where that comes from, and its value in each preset."""

    row: Row
    value: Any
    origin: str
    presets: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        row = self.row
        about = {"allowed": row.allowed, "values": row.values, "flag": row.setting.flag, "meaning": row.meaning}
        return {"key": row.key, "value": self.value, "from": self.origin, "presets": self.presets} | about


def explain(resolved: Resolved) -> list[Explained]:
    """All settings of a configuration, in the order of the table."""
    values, presets = flat(resolved.config), preset_values()
    return [
        Explained(row, values[key], resolved.origins[key], {name: preset[key] for name, preset in presets.items()})
        for key, row in TABLE.items()
    ]


def annotated_yaml(resolved: Resolved, keys: Collection[str]) -> str:
    """The settings `keys` as YAML that `--config` reads back, with the origin of each value as a comment.

    All settings together have their preset with them, as in the folder of a run.
    """
    preset = resolved.config.preset
    lines = [f"preset: {preset}"] if preset and len(keys) == len(TABLE) else []
    for section, values in resolved.config.model_dump(include=set(SECTIONS)).items():
        wanted = {name: value for name, value in values.items() if f"{section}.{name}" in keys}
        lines += [f"{section}:"] if wanted else []
        for name, value in wanted.items():
            # `config.dump_yaml` says why not all characters are written as they are.
            entry = yaml.safe_dump({name: value}, allow_unicode="\x85" not in str(value)).rstrip("\n").split("\n")
            origin = resolved.origins[f"{section}.{name}"]
            # A comment would end a text that goes on in the next line, and so would a line end in the name of a file.
            comment = f"  # {origin}" if len(entry) == 1 and origin.isprintable() else ""
            lines += [f"  {line}{comment}" if line else "" for line in entry]
    return "\n".join(lines) + "\n"


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a file for `--config`, with what the table of settings says of each setting."""
    schema = Config.model_json_schema()
    sections = {name: schema["$defs"][type(getattr(Config(), name)).__name__] for name in SECTIONS}
    for row in TABLE.values():
        sections[row.section]["properties"][row.name]["description"] = row.meaning
    schema["properties"]["preset"] = {"description": "The preset to start from.", "enum": preset_names()}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
