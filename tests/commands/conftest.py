"""A cache of its own for each test, one finished tiny run that the commands read, and the file of a sweep."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.helpers import TINY, Cda, real_text, run_cda
from tests.commands.sweeps import FILE


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
