"""The folder of a run: what may go on in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cda_cli.config import Config, parse
from cda_cli.errors import ConfigError
from cda_cli.storage import LOCK
from cda_cli.training.run_folder import check_folder, check_same_run


def test_what_a_kill_leaves_before_there_is_a_configuration_is_no_other_folder(tmp_path: Path) -> None:
    """The same command must start again, and not ask for another folder."""
    (tmp_path / LOCK).touch()
    (tmp_path / ".tmp-config.yaml-123-0123abcd").touch()
    check_folder(tmp_path)
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("model", {"dim": 256}), ("model", {"attn_eps": 0.3}), ("model", {"solver": "iterative"}),
        ("data", {"source": "other"}), ("data", {"tokenizer": "other.json"}), ("run", {"seed": 3}),
    ],
)  # fmt: skip
def test_what_makes_another_run(section: str, changes: dict[str, object]) -> None:
    """The key and both values are named, so that a person sees which is meant."""
    [(key, value)] = changes.items()
    before, now = Config(), parse({section: changes})
    with pytest.raises(ConfigError, match=rf"{section}\.{key} is .* there and {value!r} here.*another --out"):
        check_same_run(before, now, Path("run"))


@pytest.mark.parametrize(
    ("section", "changes"),
    [
        ("optim", {"steps": 5, "lr": 1.0, "batch_size": 3, "weight_decay": 0.0, "schedule": "constant"}),
        ("run", {"save_every": 1, "log_every": 3, "device": "cpu", "dtype": "float32", "keep": 5}),
    ],
)
def test_what_may_change(section: str, changes: dict[str, object]) -> None:
    check_same_run(Config(), parse({section: changes}), Path("run"))
