"""Writes the generated pages of the docs: cli.md from the commands' help, configuration.md from the settings.

    make docs

`tests/test_docs.py` fails where a page is not what this would write.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from cda_cli.config import Config, preset_names

FOLDER = Path(__file__).parent


def pages() -> dict[str, str]:
    """Name and text of each generated page."""
    return {"cli.md": commands(), "configuration.md": configuration()}


def commands() -> str:
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "cli.md"
        arguments = ["cda_cli.main", "utils", "docs", "--name", "cda", "--output", str(page)]
        subprocess.run([sys.executable, "-m", "typer", *arguments], check=True, stdout=subprocess.DEVNULL)
        return page.read_text(encoding="utf-8")


def configuration() -> str:
    presets = ", ".join(f"`{name}`" for name in preset_names())
    lines = [
        "# Configuration",
        "",
        "A run is described by four sections. The layers, the later winning: preset, `--config FILE.yaml`,",
        "`--set section.key=value`, flags. Of two `--set` with the same key the later wins. An unknown key is an error",
        "that names the nearest one, and a key that a file gives twice is an error too. The resolved configuration is",
        "written to `config.yaml` in the run folder, and `--config` reads it back.",
        "",
        "The setting decides what its text means. Numbers are decimal: `010` is ten, and `1e3` and `1_000` are a",
        "thousand, for whole numbers too; switches are `true` and `false`. `null` takes away an optional value.",
        "`--set` takes a text, such as a path, as it is: `#`, `:`, quotes and spaces are part of it.",
        "",
        f"Presets: {presets}; each is a commented file in `cda_cli/presets/`.",
    ]
    defaults = Config()
    for name, field in Config.model_fields.items():
        section = getattr(defaults, name)
        lines += ["", f"## {name}", "", f"{type(section).__doc__}", "", "| key | default | meaning |", "|---|---|---|"]
        for key, setting in type(section).model_fields.items():
            default = getattr(section, key)
            shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else f"{default}"
            lines.append(f"| `{name}.{key}` | `{shown}` | {setting.description or ''} |")
        assert field.annotation is type(section)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
