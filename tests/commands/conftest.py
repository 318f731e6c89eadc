"""A cache of its own for each test, one finished tiny run that the commands read, and the file of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from cda_cli.sweep import attempts
from tests.commands.helpers import TINY, Cda, real_text, run_cda
from tests.commands.sweeps import FILE, attempt
from tests.comparison.runs import write_run


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CDA_CACHE", str(folder))
    return folder


@pytest.fixture
def cda() -> Cda:
    return run_cda


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(real_text(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The settings of the tiny run, with its text, for `--config`."""
    path = tmp_path_factory.mktemp("settings") / "tiny.yaml"
    path.write_text(f"{TINY}data:\n  source: {text}\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A run of six steps. Only to be read."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CDA_CACHE", str(folder / "cache"))
        result = run_cda("train", "--config", tiny, "--out", folder / "run")
    assert result.code == 0, result.err
    return folder / "run"


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a sweep in the working folder."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "sweep.yaml"
    file.write_text(FILE)
    return file


@pytest.fixture
def trained(sweep: Path) -> Path:
    """The folder of a sweep whose last run failed."""
    out = sweep.parent / "runs" / "sweep"
    bits = {"plain": (4.5, 4.7, 4.3), "sparse": (4.4, 4.55, None)}
    for arm, values in bits.items():
        for seed, value in enumerate(values):
            if value is not None:
                write_run(out / arm / f"seed-{seed}", [8.0, 6.0, 5.0, value], text={})
            attempts.append(out, attempt(f"{arm}, seed {seed}", "" if value else "it burst; use a smaller --lr"))
    return out
