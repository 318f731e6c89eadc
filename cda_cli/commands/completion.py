"""What a shell offers for a word that was begun. Where nothing fits, it offers files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from cda_cli.settings import SECTIONS
from cda_cli.settings_table import TABLE, Row

Completer = Callable[[str], list[str]]

NEAR = 2  # folders down in which runs are looked for, so that the answer comes at once


def completion(values: Sequence[str]) -> Completer | None:
    """Completes an option that is one of `values`, or several with commas between."""

    def complete(incomplete: str) -> list[str]:
        before, comma, word = incomplete.rpartition(",")
        return [f"{before}{comma}{value}" for value in values if value.startswith(word)]

    return complete if values else None


def setting_completion(row: Row) -> Completer | None:
    """Completes the value of a setting."""
    found = {"run.device": complete_device, "run.init_from": complete_checkpoint}
    return found.get(row.key) or completion(row.values)


def complete_device(incomplete: str) -> list[str]:
    """auto, cpu, cuda and each GPU of this machine."""
    numbers = sorted(int(path.name.removeprefix("nvidia")) for path in Path("/dev").glob("nvidia[0-9]*"))
    return [name for name in ("auto", "cpu", "cuda", *(f"cuda:{n}" for n in numbers)) if name.startswith(incomplete)]


def complete_checkpoint(incomplete: str) -> list[str]:
    """The runs that the path leads to, and the checkpoints of the run that it is in."""
    from cda_cli.errors import CdaError
    from cda_cli.runs.folder import Run
    from cda_cli.runs.summary import find_runs
    from cda_cli.storage import CHECKPOINTS

    typed = Path(incomplete)
    folder = typed if incomplete.endswith("/") else typed.parent
    offered: list[Path] = []
    around = [folder.parent] if folder.name == CHECKPOINTS else []
    for run in (*find_runs(folder, {}, NEAR), *around):
        inside = incomplete.startswith(f"{run}/")
        try:
            offered += Run(run).checkpoints() if inside else [run]
        except CdaError:
            continue
    return [str(path) for path in offered if str(path).startswith(incomplete)]


def complete_resume(incomplete: str) -> list[str]:
    words = [word for word in ("auto", "never") if word.startswith(incomplete)]
    return [*words, *complete_checkpoint(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Sections and settings, and the runs of which `cda config` shows the settings."""
    words = [*SECTIONS, *(row.name for row in TABLE.values()), *TABLE]
    named = [word for word in words if word.startswith(incomplete) and ("." in incomplete) == ("." in word)]
    return [*dict.fromkeys(named), *complete_checkpoint(incomplete)]
