"""Data and folders that cannot be used: one sentence with the remedy, exit code 2, and nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.commands.helpers import Cda, Result, assert_refused, contents


def trained(cda: Cda, tiny: Path, tmp_path: Path, *arguments: object) -> Result:
    return cda("train", "--config", tiny, "--out", tmp_path / "run", *arguments)


@pytest.mark.parametrize(
    ("name", "content", "flags", "words"),
    [
        ("nowhere.txt", None, [], ["there is no file", "give --data"]),
        ("*.nothing", None, [], ["no file matches", "check the glob"]),
        ("empty.txt", b"", [], ["is empty", "holds text"]),
        ("short.txt", b"too short", [], ["shorter than one sequence", "seq_len 32", "--seq-len"]),
        ("letter.txt", b"x", [], ["too little text", "--data"]),
        ("rows.jsonl", b'{"body": "x"}\n' * 9, [], ["no column 'text'", "--text-column", "body"]),
        ("rows.csv", b"body\nx\n" * 9, ["--text-column", "tex"], ["no column 'tex'", "body"]),
        ("page.bin", b"\0<p>" * 99, [], ["page.bin", "text"]),
        ("rows.jsonl", b"{not json}\n", [], ["line 1", "is not JSON", "mend it"]),
        ("packed.txt.gz", b"\x1f\x8b\x08 and no more", [], ["cannot be read", "mend the file"]),
        (".", None, [], ["has no file that holds text", "give --data another folder, or a file"]),
        ("one.txt", b"words " * 99, ["--streaming"], ["single document", "leave out --streaming"]),
    ],
)
def test_data_that_cannot_be_trained_on(
    cda: Cda, tiny: Path, tmp_path: Path, name: str, content: bytes | None, flags: list[str], words: list[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if content is not None:
        (data / name).write_bytes(content)
    refused = trained(cda, tiny, tmp_path, "--data", data / name, *flags)
    assert_refused(refused, *words)
    assert refused.out == "", "a run that did not start was announced"
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "cache").rglob(".*")), "a half-written folder was left in the cache"


@pytest.mark.parametrize("name", ["hf:", "hf:a/b/c", "hf: spaced"])
def test_a_dataset_without_a_name(cda: Cda, tiny: Path, tmp_path: Path, name: str) -> None:
    assert_refused(trained(cda, tiny, tmp_path, "--data", name), "names no dataset", "OWNER/NAME")


@pytest.mark.parametrize("command", ["eval", "inspect-sparsity"])
def test_other_data_that_cannot_be_read(cda: Cda, finished: Path, tmp_path: Path, command: str) -> None:
    (tmp_path / "short.txt").write_text("s")
    assert_refused(cda(command, finished, "--data", tmp_path / "nowhere.txt"), "there is no file")
    short = cda(command, finished, "--data", tmp_path / "short.txt", "--split", "validation")
    assert_refused(short, "too little text", "give --data more text")


def test_a_folder_that_holds_something_else(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """Training into somebody's folder would mix its files with theirs."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    before = contents(tmp_path / "run")
    assert_refused(trained(cda, tiny, tmp_path), "is not empty and holds no run", "--out")
    assert contents(tmp_path / "run") == before


def test_an_empty_folder_is_taken(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert trained(cda, tiny, tmp_path, "--steps", 1).code == 0


def test_a_file_in_place_of_the_folder(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    assert_refused(trained(cda, tiny, tmp_path), "is a file", "folder")
    below = cda("train", "--config", tiny, "--out", tmp_path / "run" / "below")
    assert_refused(below, "cannot be made", "another --out")
    assert (tmp_path / "run").read_text() == "a file"


def test_a_name_that_is_too_long(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    assert_refused(cda("train", "--config", tiny, "--out", tmp_path / ("x" * 300)), "too long", "check the path")


@pytest.mark.parametrize("command", ["eval", "sample", "inspect-sparsity"])
def test_a_run_that_is_not_there(cda: Cda, finished: Path, tmp_path: Path, command: str) -> None:
    """What is missing, and what to give instead, for each way in which there is no checkpoint."""
    prompt = ["--prompt", "a"] if command == "sample" else []
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    shutil.copytree(finished, tmp_path / "emptied")
    for step in (tmp_path / "emptied" / "checkpoints").iterdir():
        shutil.rmtree(step)
    for name, words in (
        ("nowhere", ["does not exist", "give a run's folder"]),
        ("file", ["is a file", "give the folder"]),
        ("folder", ["is not a run", "that `train` wrote"]),
        ("emptied", ["has no checkpoint yet", "train until"]),
        ("emptied/checkpoints/step-00000001", ["does not exist"]),
    ):
        refused = cda(command, tmp_path / name, *prompt)
        assert_refused(refused, *words)
        assert refused.out == ""
