"""All that a comparison of runs finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cda_cli.comparison.comparable import LETTERS, Fact, facts, seed_groups
from cda_cli.comparison.curves import Curves, curves
from cda_cli.comparison.recorded import RecordedRun
from cda_cli.errors import ConfigError
from cda_cli.runs.summary import differing_settings

if TYPE_CHECKING:
    from cda_cli.comparison.models import Models


@dataclass(frozen=True)
class Result:
    """Runs side by side. The others are compared with the first.

    `seed_groups` has the letters of runs that differ in their seeds alone. `models` is None if no model was opened, and
    `not_evaluated` says why.
    """

    runs: Sequence[RecordedRun]
    facts: Mapping[str, Fact]
    seed_groups: list[str]
    differing: list[str]
    curves: Curves
    models: Models | None
    not_evaluated: str

    @property
    def letters(self) -> str:
        """What the runs are called, a letter each."""
        return LETTERS[: len(self.runs)]

    def as_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        return {
            "runs": [_run(letter, run) for letter, run in zip(self.letters, self.runs, strict=True)],
            "comparable": [{"name": name, **fact._asdict()} for name, fact in self.facts.items()],
            "seed_groups": [list(group) for group in self.seed_groups],
            "settings": {key: [run.summary.settings[key] for run in self.runs] for key in self.differing},
            "losses": self.curves.as_dict(),
            "not_evaluated": None if self.models else self.not_evaluated,
            **(self.models.as_dict() if self.models else {}),
        }


def result(runs: Sequence[RecordedRun], models: Models | None, not_evaluated: str) -> Result:
    """Compares what the `runs` recorded, and keeps what was measured of their models."""
    differing = differing_settings([run.summary for run in runs])
    return Result(runs, facts(runs), seed_groups(runs), differing, curves(runs), models, not_evaluated)


def _run(letter: str, run: RecordedRun) -> dict[str, Any]:
    return {
        "name": letter,
        "run": str(run.path),
        "state": run.summary.state,
        "step": run.summary.step,
        "steps": run.summary.steps,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "memory_bytes": run.memory_bytes,
        "layers": [asdict(layer) for layer in run.layers],
    }


def check_page(path: Path) -> None:
    """Raises ConfigError, before anything is computed, if no page can be written into the file `path`."""
    if path.is_dir():
        raise ConfigError(f"--html {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"--html {path} has no folder to lie in; make {path.parent} first")
