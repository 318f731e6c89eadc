"""A cache of its own for each test, and no network."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from cda_cli.config import DataConfig
from cda_cli.data import Corpus, prepare
from tests.data.samples import LETTERS, Prepare


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CDA_CACHE", str(folder))
    return folder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_HUB_OFFLINE=1 and HF_DATASETS_CACHE do, which are read when the libraries are first imported."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def prepared() -> Prepare:
    def run(source: object, **settings: object) -> Corpus:
        return prepare(DataConfig(source=str(source), **settings), show_progress=False)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Empty, for the data."""
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny byte-level BPE that knows <|endoftext|>, and asks for truncation and padding."""
    tokenizer = _byte_level(["<|endoftext|>"])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def marked_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a tokenizer with tokens that may begin and end a document: the ids 1 and 2."""
    path = tmp_path_factory.mktemp("tokenizer") / "marked.json"
    _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]).save(str(path))
    return path


def _byte_level(special: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LETTERS, trainer)
    return tokenizer
