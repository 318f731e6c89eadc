"""Which settings make another run, and which may change when a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from cda_cli.config import Config, parse
from cda_cli.errors import ConfigError
from cda_cli.training.resume import check_same_run


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
