"""A run goes on with its own text: told by what is in it, wherever it lies, and found from any folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cda_cli.storage import load, locate, publish
from tests.commands.helpers import Cda, Result, assert_refused, contents, metrics, real_text


def write_text(folder: Path, change: Callable[[str], str] = str) -> str:
    (folder / "text.txt").write_text(change(real_text()), encoding="utf-8")
    return "text.txt"


def write_rows(folder: Path, change: Callable[[str], str] = str) -> str:
    text = change(real_text())
    for index in range(4):
        part = text[index * 3000 : index * 3000 + 3000]
        rows = [{"text": part[start : start + 100]} for start in range(0, 3000, 100)]
        (folder / f"{index}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "*.jsonl"


WRITERS = {"mapped": write_text, "mapped files": write_rows, "streamed": write_rows}


@pytest.fixture(params=WRITERS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home [1]"  # which must not be taken for a part of the glob
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def train(cda: Cda, tiny: Path, kind: str, data: str, run: Path, steps: int) -> Result:
    streaming = ["--streaming"] if kind == "streamed" else []
    settings = ("--set", "optim.schedule_steps=8", "--steps", steps)
    return cda("train", "--config", tiny, "--data", data, "--out", run, *settings, *streaming)


def test_another_text_of_the_same_length_is_refused(cda: Cda, tiny: Path, kind: str, home: Path) -> None:
    """Its losses would go on as if nothing had happened."""
    data, run = WRITERS[kind](home), home.parent / "run"
    assert train(cda, tiny, kind, data, run, 2).code == 0
    WRITERS[kind](home, str.swapcase)
    before = contents(run)
    refused = train(cda, tiny, kind, data, run, 4)
    assert_refused(refused, "is not what", "was trained on", "put the old text back", "another --out")
    assert contents(run) == before
    WRITERS[kind](home)
    assert train(cda, tiny, kind, data, run, 4).code == 0, "the old text was put back"


def test_files_in_another_order_are_another_text(cda: Cda, tiny: Path, home: Path) -> None:
    data, run = write_rows(home), home.parent / "run"
    assert train(cda, tiny, "streamed", data, run, 2).code == 0
    (home / "0.jsonl").rename(home / "9.jsonl")
    assert_refused(train(cda, tiny, "streamed", data, run, 4), "is not what", "other content")


def test_the_same_text_elsewhere_goes_on_as_if_it_had_not_moved(cda: Cda, tiny: Path, kind: str, home: Path) -> None:
    data, other = WRITERS[kind](home), home.parent / "other"
    whole, cut = home.parent / "whole", home.parent / "cut"
    assert train(cda, tiny, kind, data, whole, 4).code == 0
    assert train(cda, tiny, kind, data, cut, 2).code == 0
    shutil.copytree(home, other)
    shutil.rmtree(home)
    os.chdir(home.parent)
    moved = train(cda, tiny, kind, f"other/{data}", cut, 4)
    assert moved.code == 0, moved.err
    assert [r["loss"] for r in metrics(cut, "train")] == [r["loss"] for r in metrics(whole, "train")]
    assert load(locate(cut), parts=()).state["config"]["data"]["source"] == str(other / data)


def test_a_tokenizer_that_was_replaced_is_seen(cda: Cda, tiny: Path, home: Path) -> None:
    """One of as many tokens would go on, and each token would mean another text."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    def write(letters: str) -> None:
        vocabulary = {letter: index for index, letter in enumerate(["?", *letters])}
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        tokenizer.save(str(home / "tokenizer.json"))

    run = ("train", "--config", tiny, "--data", write_text(home), "--tokenizer", "tokenizer.json", "--out", "run")
    write("abcde")
    assert cda(*run, "--steps", 1).code == 0
    write("edcba")
    assert_refused(cda(*run, "--steps", 2), "another tokenizer", "another --out")
    write("abcde")
    (home / "deep").mkdir()
    shutil.move(home / "tokenizer.json", home / "deep" / "tokenizer.json")
    moved = cda("train", "--out", "run", "--steps", 2, "--tokenizer", "deep/tokenizer.json")
    assert moved.code == 0, moved.err


def test_a_checkpoint_that_does_not_say_its_text_still_opens(cda: Cda, tiny: Path, home: Path) -> None:
    data, run = write_text(home), home.parent / "run"
    assert train(cda, tiny, "mapped", data, run, 2).code == 0
    saved = load(locate(run))
    del saved.state["data"]
    saved.state["config"]["data"]["source"] = data  # nor where it is
    saved.state["config"]["data"].pop("encoding")
    shutil.rmtree(run / "checkpoints")
    parts = {"model": saved.model, "optimizer": saved.optimizer, "rng": saved.rng}
    publish(run, step=2, state=saved.state, **parts)
    assert cda("eval", run).code == 0
    went_on = train(cda, tiny, "mapped", data, run, 3)
    assert went_on.code == 0, went_on.err
    assert load(locate(run), parts=()).state["data"]


@pytest.mark.parametrize("value", [3, "x", [], {"content": 7}])
def test_an_identity_that_is_none_is_one_sentence(cda: Cda, tiny: Path, home: Path, value: object) -> None:
    data, run = write_text(home), home.parent / "run"
    assert train(cda, tiny, "mapped", data, run, 2).code == 0
    saved = load(locate(run))
    saved.state["data"] = value
    shutil.rmtree(run / "checkpoints")
    publish(run, step=2, state=saved.state, model=saved.model, optimizer=saved.optimizer, rng=saved.rng)
    refused = train(cda, tiny, "mapped", data, run, 3)
    assert refused.code in (1, 2)
    assert refused.err.count("\n") == 1
    assert "unexpected" not in refused.err


def test_a_run_finds_its_text_from_any_folder_and_says_when_it_has_gone(
    cda: Cda, tiny: Path, kind: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = WRITERS[kind](home), home.parent / "run"
    assert train(cda, tiny, kind, data, run, 1).code == 0
    before = json.loads(cda("eval", run, "--json").out)
    monkeypatch.chdir(home.parent)
    after = cda("eval", run, "--json")
    assert after.code == 0, after.err
    assert json.loads(after.out) == before
    assert "home" in (run / "config.yaml").read_text()
    shutil.rmtree(home)
    assert_refused(cda("eval", run), "the text of the run", str(home.parent), data, "has gone", "--data")
    assert_refused(cda("train", "--out", run, "--steps", 3), str(home.parent), data, "--data")


def test_another_text_is_read_in_the_encoding_that_is_named_for_it(cda: Cda, tiny: Path, home: Path) -> None:
    """That of the run is of its own text; taken for another, it would turn UTF-8 into something else unsaid."""
    (home / "latin.txt").write_bytes((real_text() + "é" * 500).encode("latin-1", "replace"))
    (home / "utf8.txt").write_text("é" * 2000, encoding="utf-8")
    run = home.parent / "run"
    train = cda("train", "--config", tiny, "--data", "latin.txt", "--encoding", "ISO8859-1", "--out", run, "--steps", 1)
    assert train.code == 0, train.err
    assert cda("eval", run).code == 0
    assert cda("eval", run, "--data", "latin.txt").code == 0, "the run's own text, named"
    (home / "other.txt").write_bytes((home / "latin.txt").read_bytes())
    assert_refused(cda("eval", run, "--data", "other.txt"), "is not utf-8", "--encoding")
    assert cda("eval", run, "--data", "other.txt", "--encoding", "latin-1").code == 0
    assert cda("inspect-sparsity", run, "--data", "other.txt", "--encoding", "latin-1").code == 0
    assert cda("eval", run, "--data", "utf8.txt").code == 0
    assert_refused(cda("eval", run, "--data", "latin.txt", "--encoding", "klingon"), "klingon", "latin-1")
