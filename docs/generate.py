"""Writes the generated pages of the docs: cli.md from the help of the commands, configuration.md from the settings.

    make docs

`tests/test_docs.py` fails where a page differs from what this would write.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from cda_cli.settings import SECTIONS, TABLE, preset_names

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
        "written to `config.yaml` in the run folder, and `--config` reads it back. A default stands where no layer",
        "gives a value.",
        "",
        "The setting decides what its text means. Numbers are decimal: `010` is ten, and `1e3` and `1_000` are a",
        "thousand, for whole numbers too; switches are `true` and `false`. `null` takes away an optional value.",
        "`--set` takes a text, such as a path, as it is: `#`, `:`, quotes and spaces are part of it.",
        "",
        f"Presets: {presets}; each is a commented file in `cda_cli/presets/`.",
    ]
    for section, settings in SECTIONS.items():
        lines += ["", f"## {section}", "", f"{settings.__doc__}", ""]
        lines += ["| key | flag | default | meaning |", "|---|---|---|---|"]
        for row in TABLE.values():
            if row.section == section:
                flag = row.setting.flag and f"`{row.setting.flag.replace('/', '` `')}`"
                lines.append(f"| `{row.key}` | {flag} | `{_as_yaml(row.default)}` | {row.meaning} |")
    return "\n".join(lines) + "\n"


def _as_yaml(default: object) -> str:
    if default is None:
        return "null"
    return str(default).lower() if isinstance(default, bool) else str(default)


if __name__ == "__main__":
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
