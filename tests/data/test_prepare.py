"""documents → tokens on disk: the split, the cache, and what is left behind when it goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from cda_cli.config import DataConfig
from cda_cli.data import (
    ByteTokenizer,
    Corpus,
    PreparationStoppedError,
    load_tokenizer,
    loss_of_text,
    prepare,
    prepare_whole,
    streamed_validation,
)
from cda_cli.data.cache import cache_folder
from cda_cli.data.split import CutRule, HashRule
from cda_cli.errors import DataError, StorageError
from tests.data.samples import LETTERS, UNICODE, Prepare
from tests.data.tokenizer_kinds import KINDS, byte_level, tokenizer_of_kind, unigram
from tests.reliability.harness import FORKS, exit_code, start


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def sides(corpus: Corpus) -> tuple[list[bytes], list[bytes]]:
    train, held_out = (side.ids.tobytes().split(b"\xff")[:-1] for side in (corpus.train, corpus.validation))
    return train, held_out


def test_a_single_text_is_cut_at_a_character(prepared: Prepare, folder: Path) -> None:
    (folder / "text.txt").write_text("é🙂" * 500)
    corpus = prepared(folder / "text.txt", validation_fraction=0.25)
    assert corpus.train.ids.tobytes().decode() == "é🙂" * 375
    assert corpus.validation.ids.tobytes()[:-1].decode() == "é🙂" * 125
    assert set(corpus.train.sizes) == {1}
    assert corpus.validation.sizes.tolist() == [1] * (6 * 125) + [0], "a byte is a byte, a separator none"


@given(st.text(min_size=2), st.floats(0.001, 0.999))
def test_a_cut_loses_nothing_and_leaves_neither_side_empty(text: str, fraction: float) -> None:
    (_, head, _), (_, tail, _) = CutRule(fraction).place(text)
    assert head + tail == text
    assert head
    assert tail


def test_the_side_of_a_document_does_not_depend_on_the_others(prepared: Prepare, folder: Path) -> None:
    train, held_out = sides(prepared(write_rows(folder / "a.jsonl", LETTERS), validation_fraction=0.3))
    assert sorted(train + held_out) == [row.encode() for row in LETTERS]
    assert not set(train) & set(held_out)
    other = prepared(write_rows(folder / "b.jsonl", LETTERS[::-1] + LETTERS[:5]), validation_fraction=0.3)
    assert set(sides(other)[0]) == set(train), "the order, or a copy, moved a document to the other side"
    assert set(sides(other)[1]) == set(held_out)
    more = sides(prepared(write_rows(folder / "c.jsonl", LETTERS), validation_fraction=0.6))
    assert set(held_out) < set(more[1]), "a larger fraction let a held-out document into training"


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_few_documents_still_give_two_sides(prepared: Prepare, folder: Path, fraction: float) -> None:
    found = []
    for name, rows in (("a", LETTERS[:3]), ("b", LETTERS[2::-1])):
        path = write_rows(folder / f"{name}.jsonl", rows)
        train, held_out = sides(prepared(path, validation_fraction=fraction))
        assert len(held_out if fraction < 0.5 else train) == 1
        assert len(train + held_out) == 3
        found.append((set(train), set(held_out)))
    assert found[0] == found[1], "the order of the documents decides"


def test_copies_of_one_document_are_cut_each(prepared: Prepare, folder: Path) -> None:
    corpus = prepared(write_rows(folder / "a.jsonl", ["0123456789"] * 3), validation_fraction=0.2)
    assert corpus.train.ids.tobytes() == b"01234567" * 3
    assert corpus.validation.ids.tobytes() == b"89\xff" * 3


@given(st.lists(st.text(min_size=1), min_size=1), st.floats(0.01, 0.99))
def test_a_second_rule_follows_only_where_one_side_is_empty(texts: list[str], fraction: float) -> None:
    rule = HashRule.of_fraction(fraction)
    held_out = [rule.held_out(text) for text in texts]
    other = rule.after_one_sided(fraction)
    assert (other is not None) == (len(set(held_out)) == 1)
    if isinstance(other, HashRule):
        assert {other.held_out(text) for text in texts} == {True, False}


def test_a_json_tokenizer_gives_the_tokens_of_each_document(prepared: Prepare, folder: Path, bpe_file: Path) -> None:
    rows = [*LETTERS, UNICODE * 9000]
    corpus = prepared(write_rows(folder / "a.jsonl", rows), tokenizer=str(bpe_file))
    tokenizer = load_tokenizer(str(bpe_file))
    expected = sum(len(tokenizer.encode(row)) + 1 for row in rows)
    assert len(corpus.train) + len(corpus.validation) == expected
    assert corpus.train.ids.dtype == np.uint16
    documents = []
    for side in (corpus.train, corpus.validation):
        ends = np.flatnonzero(side.ids == tokenizer.separator)
        documents += [tokenizer.decode(part) for part in np.split(side.ids, ends + 1)[:-1]]
        assert side.sizes.sum() == side.text_bytes
    assert sorted(documents) == sorted(rows)
    assert corpus.train.text_bytes + corpus.validation.text_bytes == sum(len(row.encode()) for row in rows)
    assert loss_of_text([corpus.train, corpus.validation]) is None


def test_each_document_begins_with_bos_and_ends_with_eos(prepared: Prepare, folder: Path, marked_file: Path) -> None:
    """Whether it is prepared, streamed, or the only one, and so cut; a long one is tokenised in pieces."""
    rows, marks = [*LETTERS, UNICODE * 9000], {"bos": "<|im_start|>", "eos": "<|im_end|>"}
    source = write_rows(folder / "a.jsonl", rows)
    corpus = prepared(source, tokenizer=str(marked_file), **marks)
    begin, end = 1, 2
    found = []
    for side in (corpus.train, corpus.validation):
        assert list(np.flatnonzero(side.ids == begin)) == [0, *(np.flatnonzero(side.ids == end)[:-1] + 1)]
        assert not side.sizes[np.isin(side.ids, (begin, end))].any(), "a mark stands for no text"
        assert side.sizes.sum() == side.text_bytes
        found.append(int((side.ids == end).sum()))
    assert sum(found) == len(rows)
    config = DataConfig(source=str(source), tokenizer=str(marked_file), streaming=True, **marks)
    streamed = streamed_validation(config, load_tokenizer(str(marked_file), **marks), 10**9)
    assert streamed.ids.tobytes() == corpus.validation.ids.tobytes()
    (folder / "b.txt").write_text(UNICODE * 10, encoding="utf-8")
    cut = prepared(folder / "b.txt", tokenizer=str(marked_file), **marks)
    assert [side.ids[0] for side in (cut.train, cut.validation)] == [begin, begin]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_that_a_tokenizer_loses_is_said(prepared: Prepare, folder: Path, kind: str) -> None:
    """Else a model looks better the less of the text it is asked about."""
    text = "the cat\nλλ 日本 a "
    path, file = write_rows(folder / "a.jsonl", [f"{text}{number}" for number in "abcdefgh"]), folder / "t.json"
    file.write_text(tokenizer_of_kind(kind).to_json())
    corpus = prepared(path, tokenizer=str(file))
    said, lost = loss_of_text([corpus.train, corpus.validation]), 0
    for side in (corpus.train, corpus.validation):
        lost += side.lost_bytes
        assert side.sizes.sum() == side.text_bytes - side.lost_bytes
    whole = corpus.train.text_bytes + corpus.validation.text_bytes
    assert whole == 8 * len(f"{text}a".encode())
    if kind in ("byte_level", "byte_fallback"):
        assert said is None
    else:
        assert lost >= 8 * len("λλ日本".encode())
        assert said is not None
        assert said.startswith(f"the tokenizer loses {lost / whole:.2%} of the text")
        assert f"{lost:,} of {whole:,} bytes" in said


@pytest.mark.parametrize("kind", ["spelled", "special"])
def test_documents_that_name_the_separator_keep_their_number(prepared: Prepare, folder: Path, kind: str) -> None:
    rows = [f"{letter} <|endoftext|> a</s>b <eos>" for letter in LETTERS]
    path, file = write_rows(folder / "a.jsonl", rows), folder / "t.json"
    made = unigram() if kind == "spelled" else byte_level()
    for token in ("<|endoftext|>", "</s>"):
        made.add_tokens([AddedToken(token, special=False, normalized=kind == "spelled")])
    made.save(str(file))
    corpus = prepared(path, tokenizer=str(file))
    ids = np.concatenate([corpus.train.ids, corpus.validation.ids])
    assert (ids == corpus.tokenizer.separator).sum() == len(rows)


def test_a_whole_text_is_one_piece(folder: Path) -> None:
    (folder / "a.txt").write_text("é🙂" * 50)
    config = DataConfig(source=str(folder / "a.txt"))
    tokens, description = prepare_whole(config, tokenizer=ByteTokenizer(), show_progress=False)
    assert tokens.ids.tobytes() == ("é🙂" * 50).encode() + b"\xff"
    assert description == str(folder / "a.txt")


def test_the_second_time_comes_from_the_cache(prepared: Prepare, folder: Path, bpe_file: Path) -> None:
    path = write_rows(folder / "a.jsonl", LETTERS)
    first = prepared(path)
    assert not first.from_cache
    again = prepared(path)
    assert again.from_cache
    assert isinstance(again.train.ids, np.memmap)
    assert (again.train.ids == first.train.ids).all()
    assert again.description == first.description
    assert not prepared(path, tokenizer=str(bpe_file)).from_cache
    assert not prepared(path, validation_fraction=0.2).from_cache
    path.write_text(path.read_text().replace("document", "Document"))
    changed = prepared(path)
    assert not changed.from_cache, "the file changed and the old tokens came back"
    assert changed.train.ids.tobytes().startswith(b"Document")


def test_another_column_is_another_cache_entry(prepared: Prepare, folder: Path) -> None:
    rows = [{"text": letter, "other": letter.upper()} for letter in LETTERS]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared(folder / "a.jsonl")
    other = prepared(folder / "a.jsonl", text_column="other")
    assert not other.from_cache
    assert other.train.ids.tobytes().startswith(b"DOCUMENT")


@pytest.mark.parametrize("damage", ["short", "long", "gone", "sizes", "no meta", "bad meta", "old"])
def test_a_damaged_cache_is_prepared_anew(prepared: Prepare, folder: Path, cache: Path, damage: str) -> None:
    path = write_rows(folder / "a.jsonl", LETTERS)
    expected = prepared(path).train.ids.tobytes()
    (entry,) = cache.glob("tokens/*")
    train, meta = entry / "train.bin", entry / "meta.json"
    if damage == "short":
        train.write_bytes(expected[:-1])
    elif damage == "long":
        train.write_bytes(expected + b"x")
    elif damage == "gone":
        train.unlink()
    elif damage == "sizes":
        (entry / "train-sizes.bin").write_bytes(b"")
    elif damage == "old":
        meta.write_text(meta.read_text().replace('"format": 3', '"format": 1'))
    elif damage == "no meta":
        meta.unlink()
    else:
        meta.write_text('{"format": 1, "tok')
    corpus = prepared(path)
    assert not corpus.from_cache
    assert corpus.train.ids.tobytes() == expected
    assert [found.name for found in cache.glob("tokens/*")] == [entry.name], "something was left beside it"
    assert prepared(path).from_cache


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stopped_preparation_leaves_nothing(folder: Path, cache: Path, after: int) -> None:
    (folder / "a.txt").write_text(UNICODE * 200_000)
    asked = itertools.count()
    config = DataConfig(source=str(folder / "a.txt"))
    with pytest.raises(PreparationStoppedError):
        prepare(config, show_progress=False, should_stop=lambda: next(asked) >= after)
    assert next(asked) == after + 1, "it did not stop at once"
    assert not list(cache.glob("tokens/*"))
    assert not prepare(config, show_progress=False).from_cache


def test_an_interrupt_leaves_nothing(folder: Path, cache: Path) -> None:
    def interrupt() -> bool:
        raise KeyboardInterrupt

    path = write_rows(folder / "a.jsonl", LETTERS)
    with pytest.raises(KeyboardInterrupt):
        prepare(DataConfig(source=str(path)), show_progress=False, should_stop=interrupt)
    assert not list(cache.glob("tokens/*"))


def test_a_cache_that_cannot_be_written_is_one_sentence(prepared: Prepare, folder: Path, cache: Path) -> None:
    cache.write_text("a file is in the way")
    with pytest.raises(StorageError, match=r"^no prepared tokens: could not write .*; CDA_CACHE can name another"):
        prepared(write_rows(folder / "a.jsonl", LETTERS))


def prepare_on_a_full_disk(source: Path, cache: Path, said: Connection) -> None:
    """Prepares in a child whose files hold no more than 100 kB."""
    os.environ["CDA_CACHE"] = str(cache)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        prepare(DataConfig(source=str(source)), show_progress=False)
    except StorageError as error:
        said.send(str(error))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(folder: Path, cache: Path) -> None:
    (folder / "a.txt").write_text("x" * 1_000_000)
    listener, said = FORKS.Pipe(duplex=False)
    assert exit_code(start(prepare_on_a_full_disk, folder / "a.txt", cache, said)) == 0
    assert listener.poll(), "the tokens were prepared"
    assert listener.recv().startswith("no prepared tokens: could not write ")
    assert not list(cache.glob("tokens/*"))


def prepare_at_once(source: Path, cache: Path, gate: Any, said: Connection) -> None:
    """Prepares in a child, once all are at the gate."""
    os.environ["CDA_CACHE"] = str(cache)
    gate.wait()
    corpus = prepare(DataConfig(source=str(source)), show_progress=False)
    said.send((len(corpus.train), len(corpus.validation)))


@pytest.mark.slow
def test_two_processes_at_once_both_end_well(folder: Path, cache: Path) -> None:
    (folder / "a.txt").write_text(UNICODE * 200_000)
    gate, pipes = FORKS.Barrier(2), [FORKS.Pipe(duplex=False) for _ in range(2)]
    running = [start(prepare_at_once, folder / "a.txt", cache, gate, said) for _, said in pipes]
    assert [exit_code(process) for process in running] == [0, 0]
    lengths = [listener.recv() for listener, _ in pipes]
    assert lengths[0] == lengths[1] > (0, 0)
    assert len(list(cache.glob("tokens/*"))) == 1


def test_what_a_killed_process_left_is_swept(prepared: Prepare, folder: Path, cache: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left, other = (cache / "tokens" / f".tmp-key-{pid}-01234567" for pid in (gone.pid, os.getppid()))
    for path in (left, other):
        path.mkdir(parents=True)
        (path / "train.bin").write_text("half")
    prepared(write_rows(folder / "a.jsonl", LETTERS))
    assert not left.exists()
    assert other.exists(), "a process that lives may still be writing it"


def test_progress_goes_to_stderr_and_only_when_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "a.txt").write_text("some text " * 1000)
    config = DataConfig(source=str(folder / "a.txt"))
    prepare(config, show_progress=False)
    assert capsys.readouterr() == ("", "")
    (folder / "a.txt").write_text("other text " * 1000)
    prepare(config, show_progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "tokens" in shown.err


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CDA_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("CDA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cda"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "cda"


def test_whitespace_only_rows_that_become_no_tokens_are_an_error(prepared: Prepare, folder: Path) -> None:
    with pytest.raises(DataError, match=r"holds no text; give --data something to train on$"):
        prepared(write_rows(folder / "a.jsonl", ["", ""]))
