"""`--data` → documents: every kind of file, datasets that come split, and each bad input."""

from __future__ import annotations

import gzip
import json
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cda_cli.config import DataConfig
from cda_cli.data import Corpus, open_source
from cda_cli.errors import DataError
from tests.data.samples import LETTERS, UNICODE, Prepare, as_csv

ROWS = [*LETTERS, UNICODE, "NA", "007", "2024-01-01", "null"]


def texts(corpus: Corpus) -> list[str]:
    """The documents of both sides, in no particular order."""
    both = corpus.train.ids.tobytes() + corpus.validation.ids.tobytes()
    assert both.endswith(b"\xff"), "the last document has no separator"
    return [part.decode() for part in both.split(b"\xff")[:-1]]


def write_jsonl(path: Path, column: str = "text") -> None:
    path.write_text("".join(json.dumps({"n": 1, column: row}) + "\n" for row in ROWS))


def write_json(path: Path, column: str = "text") -> None:
    path.write_text(json.dumps([{"n": 1, column: row} for row in ROWS]))


def write_csv(path: Path, column: str = "text") -> None:
    path.write_bytes(as_csv([["n", column], *([1, row] for row in ROWS)]))


def write_parquet(path: Path, column: str = "text") -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"n": [1] * len(ROWS), column: ROWS}), path, row_group_size=4)


TABLES: dict[str, Callable[..., None]] = {
    "rows.jsonl": write_jsonl,
    "rows.json": write_json,
    "rows.csv": write_csv,
    "rows.parquet": write_parquet,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_gives_a_document_a_row(prepared: Prepare, folder: Path, name: str) -> None:
    TABLES[name](folder / name)
    assert sorted(texts(prepared(folder / name))) == sorted(ROWS)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_packed_table_is_read_by_its_inner_ending(prepared: Prepare, folder: Path, name: str) -> None:
    TABLES[name](folder / name)
    packed = folder / f"{name}.gz"
    packed.write_bytes(gzip.compress((folder / name).read_bytes()))
    assert sorted(texts(prepared(packed))) == sorted(ROWS)


@pytest.mark.parametrize("name", TABLES)
def test_another_column_is_taken(prepared: Prepare, folder: Path, name: str) -> None:
    TABLES[name](folder / name, "body")
    assert sorted(texts(prepared(folder / name, text_column="body"))) == sorted(ROWS)


@pytest.mark.parametrize("name", TABLES)
def test_a_missing_column_names_those_there_are(prepared: Prepare, folder: Path, name: str) -> None:
    TABLES[name](folder / name, "body")
    with pytest.raises(DataError, match=r"has no column 'text'; choose --text-column from n, body$"):
        prepared(folder / name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_a_column_of_numbers_is_one_sentence(prepared: Prepare, folder: Path, name: str) -> None:
    TABLES[name](folder / name)
    with pytest.raises(DataError, match=r"^the column 'n' of .* holds .*, not text; choose another --text-column$"):
        prepared(folder / name, text_column="n")


def test_rows_without_text_are_left_out(prepared: Prepare, folder: Path) -> None:
    rows = [{"text": "one"}, {"text": None}, {"text": ""}, {"n": 2}, {"text": "two"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sorted(texts(prepared(folder / "rows.jsonl"))) == ["one", "two"]


@pytest.mark.parametrize("name", ["plain.txt", "plain.txt.gz", "enwik8.gz", "PLAIN.TXT"])
def test_a_text_keeps_every_character_and_line_ending(prepared: Prepare, folder: Path, name: str) -> None:
    content = UNICODE.encode() * 50
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    corpus = prepared(folder / name)
    assert corpus.train.ids.tobytes() + corpus.validation.ids.tobytes() == content + b"\xff"


def test_a_glob_takes_every_file_as_a_document(prepared: Prepare, folder: Path) -> None:
    (folder / "deep [x]").mkdir()
    for index, letter in enumerate(LETTERS):
        (folder / "deep [x]" / f"{index}.txt").write_text(letter)
    (folder / "deep [x]" / "other.md").write_text("not matched")
    assert sorted(texts(prepared(folder / "**" / "*.txt"))) == LETTERS


def test_a_name_with_glob_characters_is_taken_as_it_is(prepared: Prepare, folder: Path) -> None:
    write_jsonl(folder / "rows[1]*.jsonl")
    assert sorted(texts(prepared(folder / "rows[1]*.jsonl"))) == sorted(ROWS)


def test_the_standard_library_is_split_by_file(prepared: Prepare) -> None:
    corpus = prepared("stdlib")
    train = set(corpus.train.ids.tobytes().split(b"\xff"))
    held_out = set(corpus.validation.ids.tobytes().split(b"\xff"))
    assert train & held_out == {b""}, "a file is on both sides"
    assert Path(os.__file__).read_bytes() in train | held_out
    share = len(corpus.validation) / (len(corpus.train) + len(corpus.validation))
    assert 0.02 < share < 0.3
    assert len(corpus.train) > 1_000_000


@pytest.fixture
def dataset(folder: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` takes for OWNER/NAME, with a split to train on and one to validate on."""
    home = folder / "owner" / "name"
    home.mkdir(parents=True)
    (home / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in LETTERS[:20]))
    (home / "validation.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in LETTERS[20:]))
    monkeypatch.chdir(folder)
    return home


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_validates_on_its_own_split(prepared: Prepare, dataset: Path, streaming: bool) -> None:
    corpus = prepared("hf:owner/name", streaming=streaming)
    assert corpus.train.ids.tobytes().decode("latin-1").split("\xff")[:-1] == LETTERS[:20]
    assert corpus.validation.ids.tobytes().decode("latin-1").split("\xff")[:-1] == LETTERS[20:]
    assert prepared("hf:owner/name", streaming=streaming).from_cache


def test_the_split_that_is_trained_on_is_not_validated_on(prepared: Prepare, dataset: Path) -> None:
    assert sorted(texts(prepared("hf:owner/name", split="validation"))) == LETTERS[20:]


def test_faults_of_a_dataset_are_one_sentence(prepared: Prepare, dataset: Path) -> None:
    with pytest.raises(DataError, match=r"has no split 'dev'; choose --data-split from train, validation$"):
        prepared("hf:owner/name", split="dev")
    with pytest.raises(DataError, match=r"has no column 'body'; choose --text-column from text$"):
        prepared("hf:owner/name", text_column="body")
    with pytest.raises(DataError, match=r"'extra' not found.*; check hf:OWNER/NAME:CONFIG$"):
        prepared("hf:owner/name:extra")


def test_a_dataset_of_the_hub_without_network_is_one_sentence(prepared: Prepare, offline: None) -> None:
    with pytest.raises(DataError, match=r"^the Hugging Face hub is out of reach and .*; connect to the network, or"):
        prepared("hf:no-such-owner/no-such-dataset")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (
            "nothing.txt",
            r"^there is no file .*nothing\.txt; give --data a file, a glob, a folder, https://…, hf:",
        ),
        ("*.nothing", r"^no file matches .*; check the glob given to --data$"),
        ("empty.txt", r"empty\.txt is empty; give --data a file that holds text$"),
        ("empty.gz", r"empty\.gz holds no text; give --data something to train on$"),
        ("blank.jsonl", r"blank\.jsonl .*; "),
        ("picture.png", r"picture\.png is binary, not text \(byte 8 is NUL\); give --data files of text$"),
        ("pi*", r"picture\.png is binary, not text "),
        ("pages.pdf", r"pages\.pdf is not utf-8 at byte 9, line 2; name its encoding with --encoding, or give"),
        ("table.parquet.gz", r"table\.parquet\.gz is compressed with gzip, which a \.parquet is not read with; "),
        ("one.txt", r"one\.txt holds too little text to have a train side; give --data more text$"),
        ("broken.gz", r"broken\.gz cannot be read \(.*\); mend the file, or give --data another$"),
        ("cut.gz", r"cut\.gz cannot be read \(.*\); mend the file, or give --data another$"),
        ("broken.jsonl", r"^line 2 of .*broken\.jsonl is not JSON \(.*\); mend it, or give --data another file$"),
        ("broken.parquet", r"broken\.parquet cannot be read .*; mend "),
        ("x" * 300, r"cannot be read \(File name too long\); "),
        ("/work\0", r"^there is no file "),
        ("/dev/null", r"^/dev/null is no ordinary file; give --data a file, "),
    ],
)
def test_bad_data_is_one_sentence_and_leaves_nothing(
    prepared: Prepare, folder: Path, cache: Path, source: str, sentence: str
) -> None:
    contents = {
        "empty.txt": b"",
        "empty.gz": gzip.compress(b""),
        "blank.jsonl": b"\n\n",
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "pages.pdf": b"%PDF-1.4\n\xe2\xe3\xcf\xd3",
        "table.parquet.gz": gzip.compress(b"PAR1"),
        "one.txt": b"x",
        "broken.gz": b"\x1f\x8b\x08 is how gzip begins",
        "cut.gz": gzip.compress(os.urandom(5000))[:3000],
        "broken.jsonl": b'{"text": "a"}\n{"text": \n',
        "broken.parquet": b"PAR1 this is not parquet",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence) as caught:
        prepared(folder / source)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("tokens/*"))


@pytest.mark.parametrize("streaming", [False, True])
def test_the_libraries_say_nothing_and_are_as_they_were(
    prepared: Prepare, dataset: Path, capfd: pytest.CaptureFixture[str], streaming: bool
) -> None:
    """An error is one sentence of ours; a bad file has a logger of `datasets` say another."""
    import datasets

    logger = logging.getLogger("datasets")
    before = logger.level
    (dataset / "train.jsonl").write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError):
        prepared("hf:owner/name", streaming=streaming)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()
    assert logger.level == before


@pytest.mark.parametrize("name", ["rows.csv", "plain.txt"])
def test_local_files_touch_neither_the_cache_of_datasets_nor_the_network(
    prepared: Prepare, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import datasets.config

    TABLES["rows.csv"](folder / name)
    unwritable = folder / "file"
    unwritable.write_text("no folder")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", unwritable)
    looked_up: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: looked_up.append(host) or [])
    assert len(prepared(folder / name).train) > 0
    assert not looked_up
    assert unwritable == datasets.config.HF_DATASETS_CACHE


def test_documents_can_be_read_again_from_a_position(folder: Path) -> None:
    """Twice over: the position is taken up, read on from, and taken up again."""
    for name, write in TABLES.items():
        write(folder / name)
        write(folder / f"second-{name}")
        documents = open_source(DataConfig(source=str(folder / f"*{name}"))).training
        everything = list(documents.read())
        assert [text for text, _ in everything] == ROWS + ROWS, name
        for index, (_, position) in list(enumerate(everything[:-1]))[::3]:
            text, after = next(documents.read(json.loads(json.dumps(position))))
            assert text == everything[index + 1][0], f"{name} at {index}"
            assert [text for text, _ in documents.read(after)] == [text for text, _ in everything[index + 2 :]]
        assert list(documents) == ROWS + ROWS, "reading from a position moved the start"
