"""The settings: the type, default, limits, meaning and flag of each setting stand here, and nowhere else.

`config` makes the validated configuration from them. `settings_table` makes the table of them, from which `commands`
makes the flags with their help and their completion, and `docs/generate.py` the pages. Every `cda --help` reads this
package, so it imports no pydantic.
"""

from pathlib import Path
from typing import Literal

from cda_cli.settings.data import DataSettings
from cda_cli.settings.model import ModelSettings
from cda_cli.settings.optim import OptimSettings
from cda_cli.settings.run import MOST_THREADS, Dtype, RunSettings
from cda_cli.settings.setting import Setting, Table

__all__ = [
    "DEFAULT_PRESET", "MOST_THREADS", "PRESET_FOLDER", "SECTIONS", "DataSettings", "Dtype", "ModelSettings",
    "OptimSettings", "RunSettings", "Setting", "Side", "preset_names",
]  # fmt: skip

PRESET_FOLDER = Path(__file__).parent.parent / "presets"
DEFAULT_PRESET = "tiny"

Side = Literal["validation", "train", "all"]  # of a text

SECTIONS: dict[str, type[Table]] = {
    "model": ModelSettings, "data": DataSettings, "optim": OptimSettings, "run": RunSettings,
}  # fmt: skip


def preset_names() -> list[str]:
    """Sorted by name."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))
