"""Gives each test a cache of its own, a text, and the settings of a tiny run that uses everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from cda_cli.config import Config, parse
from tests.commands.helpers import real_text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CDA_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Settings of twelve steps with dropout, accumulation and an annealed ε, where both layers select."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(real_text(), encoding="utf-8")
    return parse(
        {
            "model": {
                "seq_len": 16, "dim": 16, "depth": 2, "heads": 2, "dropout": 0.2, "null_kv": 1, "attn_k": 3.0,
                "learned_k": True, "eps_anneal_start": 2.0, "ff": "coordinate-descent", "ff_k": 8.0,
                "output_gate": True, "norm": "rmsnorm",
            },
            "data": {"source": str(text)},
            "optim": {
                "steps": 12, "schedule_steps": 12, "batch_size": 2, "grad_accum": 2, "warmup_steps": 4, "lr": 3e-3,
            },
            "run": {
                "log_every": 1, "eval_every": 5, "eval_batches": 2, "save_every": 4, "sample_every": 7,
                "sample_tokens": 24, "device": "cpu", "dtype": "float32",
            },
        }
    )  # fmt: skip
