"""`--tokenizer bpe:N`: trained on the training side, the same for the same text, kept, and exact in its bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cda_cli.config import DataConfig
from cda_cli.data import Corpus, PreparationStoppedError, Tokenizer, load_tokenizer, prepare, tokenizer_from_json
from cda_cli.errors import DataError
from tests.data.samples import LETTERS, UNICODE, Prepare

ROWS = [f"{row} {row.upper()} λ≈{index}" for index, row in enumerate(LETTERS * 3)]


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def rows(folder: Path) -> Path:
    return write_rows(folder / "rows.jsonl", ROWS)


def vocabulary(corpus: Corpus) -> dict[str, int]:
    found: dict[str, int] = json.loads(corpus.tokenizer.to_json() or "")["model"]["vocab"]
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("trained")
    config = DataConfig(source=str(write_rows(folder / "rows.jsonl", ROWS)), tokenizer="bpe:330")
    return prepare(config, show_progress=False, spare_cache=folder / "cache").tokenizer


@given(st.text(st.characters(exclude_categories=["Cs"])))
@example(UNICODE)
@example("document a: aaa <|endoftext|> \0\r\n\u2028")
def test_any_text_comes_back_and_each_token_counts_its_bytes(trained: Tokenizer, text: str) -> None:
    ids, sizes = trained.encode_sized(text)
    assert trained.decode(ids) == text
    assert int(sizes.sum(dtype=np.int64)) == len(text.encode())
    assert trained.separator not in ids


def test_the_vocabulary_has_the_size_that_was_asked_for(prepared: Prepare, rows: Path) -> None:
    for size in (257, 300, 330):
        corpus = prepared(rows, tokenizer=f"bpe:{size}")
        assert corpus.tokenizer.vocab_size == size, "with its separator"
        assert sorted(vocabulary(corpus).values()) == list(range(size))
        for side in (corpus.train, corpus.validation):
            assert side.lost_bytes == 0
            assert int(side.sizes.sum(dtype=np.int64)) == side.text_bytes
            assert int(side.ids.max()) < size
    assert len(corpus.train) < corpus.train.text_bytes / 2, "nothing was merged"


@pytest.mark.parametrize("single", [False, True])
def test_only_the_training_side_trains_it(prepared: Prepare, folder: Path, single: bool) -> None:
    """The held-out text repeats a word that the training text lacks: a tokenizer that saw it would have the word."""
    if single:
        path = folder / "text.txt"
        path.write_text("some words of the text to train on, and words. " * 40 + "xylophone " * 40)
        corpus = prepared(path, tokenizer="bpe:270", validation_fraction=0.175)
    else:
        held_out = [row.decode() for row in sides(prepared(write_rows(folder / "a.jsonl", ROWS), tokenizer="bytes"))[1]]
        assert held_out
        # The side of a document follows from its text alone, so the test looks for texts that are held out.
        words = [f"xylophone {number} " + "xylophone " * 50 for number in range(60)]
        both = sides(prepared(write_rows(folder / "b.jsonl", ROWS + words), tokenizer="bytes"))
        chosen = [row for row in words if row.encode() in both[1]]
        assert chosen
        corpus = prepared(write_rows(folder / "c.jsonl", ROWS + chosen), tokenizer="bpe:320")
        assert b"xylophone" in b"".join(sides(prepared(folder / "c.jsonl"))[1])
    assert not any("ylop" in token for token in vocabulary(corpus))
    assert any(len(token) > 4 for token in vocabulary(corpus))


def sides(corpus: Corpus) -> tuple[list[bytes], list[bytes]]:
    train, held_out = (side.ids.tobytes().split(b"\xff")[:-1] for side in (corpus.train, corpus.validation))
    return train, held_out


def test_the_same_text_gives_the_same_bytes(
    rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With many ties, since each letter occurs as often as the others; with threads, and without."""
    found = set()
    for number in range(6):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true" if number % 2 else "false")
        config = DataConfig(source=str(rows), tokenizer="bpe:320")
        corpus = prepare(config, show_progress=False, spare_cache=tmp_path / str(number))
        found.add((corpus.tokenizer.to_json(), corpus.train.digest))
    assert len(found) == 1


def test_it_is_trained_once(prepared: Prepare, rows: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers

    first = prepared(rows, tokenizer="bpe:300")
    (entry,) = cache.glob("tokenizers/*")

    def refuse(*_: object) -> None:
        raise AssertionError("it was trained again")

    with monkeypatch.context() as patched:
        patched.setattr(tokenizers.Tokenizer, "train_from_iterator", refuse)
        again = prepared(rows, tokenizer="bpe:300")
    assert again.from_cache
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    (entry / "tokenizer.json").write_text("{}")
    assert prepared(rows, tokenizer="bpe:300").tokenizer.to_json() == first.tokenizer.to_json()
    write_rows(rows, [*ROWS, *(f"other words {number}, other words" for number in range(300))])
    assert prepared(rows, tokenizer="bpe:300").tokenizer.fingerprint != first.tokenizer.fingerprint
    assert prepared(rows, tokenizer="bpe:300", validation_fraction=0.4).tokenizer.vocab_size == 300
    assert len(list(cache.glob("tokenizers/*"))) == 3


def test_a_checkpoint_holds_all_of_it(trained: Tokenizer) -> None:
    again = tokenizer_from_json(trained.to_json())
    assert again.fingerprint == trained.fingerprint
    assert (again.vocab_size, again.separator) == (trained.vocab_size, trained.separator)
    assert again.encode(UNICODE).tolist() == trained.encode(UNICODE).tolist()


def test_its_one_special_token_may_begin_a_document_too(prepared: Prepare, rows: Path) -> None:
    tokenizer = prepared(rows, tokenizer="bpe:300", bos="<|endoftext|>").tokenizer
    assert tokenizer.bos == tokenizer.separator
    with pytest.raises(DataError, match=r"bpe:300 has no special token '<s>'; set data\.bos"):
        prepared(rows, tokenizer="bpe:300", bos="<s>")


def test_few_documents_train_on_the_side_that_the_second_rule_gives(prepared: Prepare, folder: Path) -> None:
    path = write_rows(folder / "a.jsonl", ROWS[:3])
    assert prepared(path, tokenizer="bpe:262", validation_fraction=0.999).tokenizer.vocab_size == 262


@pytest.mark.parametrize(
    "spec", ["bpe:", "bpe:256", "bpe:0", "bpe:-300", "bpe:8k", "bpe: 300", "bpe:3e3", "bpe:99999999"]
)
def test_a_size_that_is_none_is_one_sentence(prepared: Prepare, rows: Path, spec: str) -> None:
    with pytest.raises(DataError, match=rf"^{spec} is no size of a vocabulary; write .*bpe:N, .* 257, .*8192$"):
        prepared(rows, tokenizer=spec)


def test_a_text_that_is_too_short_names_the_size_it_has_text_for(prepared: Prepare, rows: Path) -> None:
    with pytest.raises(DataError, match=r"has text for \d+ tokens only; write --tokenizer bpe:\d+, or give") as caught:
        prepared(rows, tokenizer="bpe:8192")
    fitting = str(caught.value).partition("--tokenizer ")[2].partition(",")[0]
    assert prepared(rows, tokenizer=fitting).tokenizer.vocab_size == int(fitting.removeprefix("bpe:"))


def test_a_stream_trains_none(folder: Path) -> None:
    with pytest.raises(DataError, match=r"^bpe:300 is trained on the whole training text, .*; leave out --streaming"):
        load_tokenizer("bpe:300")


def test_stopping_leaves_nothing(rows: Path, cache: Path) -> None:
    with pytest.raises(PreparationStoppedError):
        prepare(DataConfig(source=str(rows), tokenizer="bpe:300"), show_progress=False, should_stop=lambda: True)
    assert not list(cache.glob("tokenizers/*"))
    assert not list(cache.glob("tokenizers/.tmp*"))
