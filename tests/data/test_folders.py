"""A folder → the text in it: which files, in which order, what is left out, and the datasets that lie in one."""

from __future__ import annotations

import gzip
import json
import os
from itertools import islice
from pathlib import Path

import pytest

from cda_cli.config import DataConfig
from cda_cli.data import ByteTokenizer, StreamedBatches, open_source
from cda_cli.errors import DataError
from tests.data.samples import LETTERS, UNICODE, Prepare

BINARY = b"\x7fELF\x02\x01\x01\x00\x00"


def documents(source: object, **settings: object) -> list[str]:
    return list(open_source(DataConfig(source=str(source), **settings)).training)


def description(source: object, **settings: object) -> str:
    return open_source(DataConfig(source=str(source), **settings)).description


@pytest.mark.parametrize("name", ["a.py", "a.md", "a.rst", "a.html", "a.tex", "a.log", "a.f90", "Makefile", "a.py.xz"])
def test_text_of_any_ending_keeps_every_character(prepared: Prepare, folder: Path, name: str) -> None:
    import lzma

    content = UNICODE.replace("\0", "").encode() * 20
    (folder / name).write_bytes(lzma.compress(content) if name.endswith(".xz") else content)
    corpus = prepared(folder / name)
    assert corpus.train.ids.tobytes() + corpus.validation.ids.tobytes() == content + b"\xff"


def test_a_folder_is_read_in_the_order_of_its_paths(folder: Path) -> None:
    for number, name in enumerate(["z.md", "b/c.py", "b/a/deep.txt", "a.log", "b.rst"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{number} {name}")
    assert documents(folder) == ["3 a.log", "4 b.rst", "2 b/a/deep.txt", "1 b/c.py", "0 z.md"]
    assert description(folder) == f"{folder}, 5 files"


def test_what_a_folder_leaves_out_is_said(folder: Path) -> None:
    (folder / "a.txt").write_text("text")
    (folder / "empty.txt").touch()
    (folder / "program").write_bytes(BINARY)
    (folder / "latin1.dat").write_bytes("café".encode("latin-1"))
    (folder / "old.tar.gz").write_bytes(gzip.compress(BINARY))
    (folder / ".hidden").write_text("hidden")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    (folder / "settings.json").write_text('{"name": "a"}')
    (folder / "numbers.csv").write_text("n,m\n1,2\n")
    assert documents(folder) == ["text"]
    assert description(folder) == (
        f"{folder}, 1 file; left out: 3 binary, 1 broken or special, 2 hidden, 2 without a column 'text'"
    )


def test_a_loop_of_links_ends(folder: Path) -> None:
    (folder / "a").mkdir()
    (folder / "a" / "one.txt").write_text("one")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "self").symlink_to(folder / "a")
    (folder / "0").symlink_to(folder / "a")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "two.txt").write_text("two")
    (outside / "back").symlink_to(folder)
    (folder / "other").symlink_to(outside)
    assert documents(folder) == ["one", "two"]
    assert "4 linked again" in description(folder)
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert documents(link) == ["one", "two"], "a link to the folder itself is the folder"


@pytest.mark.parametrize("other", ["checkpoints", "metrics.jsonl", ".lock"])
def test_only_the_folder_of_a_run_is_left_out(folder: Path, other: str) -> None:
    for name in ("run", "project"):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(name)
        (folder / name / "notes.md").write_text("notes of the " + name)
    (folder / "run" / other).write_text("{}")
    assert documents(folder) == ["project", "notes of the project"]
    assert description(folder) == f"{folder}, 2 files; left out: 1 run"
    assert "notes of the run" in documents(folder / "run"), "a run that --data names itself is read"


def test_a_file_that_is_text_by_its_ending_is_never_left_out(folder: Path) -> None:
    """Dropping it would train on less than was given."""
    (folder / "a.txt").write_text("text")
    (folder / "b.md").write_bytes("café".encode("latin-1"))
    with pytest.raises(DataError, match=r"b\.md is not utf-8 at byte 3, line 1; name its encoding with --encoding"):
        documents(folder)
    assert documents(folder, encoding="latin-1") == ["text", "café"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", "[1, 2, 3]"),
        ("tsconfig.json", '{\n  // the target\n  "target": "es2022"\n}\n'),
        ("number.json", '{"text": 3}'),
        ("lines.jsonl", "no JSON\n"),
        ("quotes.csv", '"text" a\nrow\n'),
    ],
)
def test_a_file_that_is_no_table_does_not_spoil_its_folder(folder: Path, name: str, content: str) -> None:
    (folder / "a.txt").write_text("text")
    (folder / name).write_text(content)
    assert documents(folder) == ["text"]
    assert description(folder) == f"{folder}, 1 file; left out: 1 not a table of text"
    with pytest.raises(DataError, match=rf"{name} "):
        documents(folder / name)


def test_a_damaged_table_of_a_folder_is_one_sentence(folder: Path) -> None:
    """Its text before the damage shows that it is meant as one."""
    (folder / "a.txt").write_text("text")
    (folder / "b.jsonl").write_text('{"text": "row"}\n{"text": \n')
    with pytest.raises(DataError, match=r"^line 2 of .*b\.jsonl is not JSON"):
        documents(folder)


@pytest.mark.parametrize("content", [None, b"", BINARY])
def test_a_folder_without_text_is_one_sentence(folder: Path, content: bytes | None) -> None:
    if content is not None:
        (folder / "a.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"has no file that holds text.*; give --data another folder, or a file$"):
        documents(folder)


def write_mixed(folder: Path) -> None:
    (folder / "a.md").write_text(LETTERS[0])
    (folder / "b.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": row}) + "\n" for row in LETTERS[1:9]).encode())
    )
    (folder / "c.csv").write_text("n,text\n" + "".join(f"1,{row}\n" for row in LETTERS[9:20]))
    (folder / "d").write_text(LETTERS[20])


@pytest.mark.parametrize("pattern", ["*", ""])
def test_kinds_mix_and_a_position_in_them_is_exact(folder: Path, pattern: str) -> None:
    write_mixed(folder)
    source = open_source(DataConfig(source=str(folder / pattern), streaming=True))
    everything = list(source.training.read())
    assert [text for text, _ in everything] == LETTERS[:21]
    for index, (_, position) in enumerate(everything):
        rest = [text for text, _ in source.training.read(json.loads(json.dumps(position)))]
        assert rest == LETTERS[index + 1 : 21]


def test_a_stream_of_a_folder_resumes_after_any_batch(folder: Path) -> None:
    write_mixed(folder)
    config = DataConfig(source=str(folder), streaming=True)
    through = list(islice(StreamedBatches(config, ByteTokenizer(), 16, 2), 40))
    for at in (0, 7, 20, 33):
        rest = StreamedBatches(config, ByteTokenizer(), 16, 2, through[at][1])
        for (batch, state), (expected, after) in zip(islice(rest, 5), through[at + 1 :], strict=False):
            assert batch.inputs.equal(expected.inputs)
            assert state == after


def test_a_folder_is_known_by_its_text(prepared: Prepare, folder: Path) -> None:
    """A copy is the same; other text, another order, or the same bytes read as another kind are not."""
    write_mixed(folder)
    first = open_source(DataConfig(source=str(folder))).identity
    copy = folder.parent / "copy"
    copy.mkdir()
    write_mixed(copy)
    (copy / ".more").write_text("hidden")
    assert open_source(DataConfig(source=str(copy))).identity == first
    prepared(folder)
    assert prepared(copy).from_cache
    for change in ("c.csv", "e"):
        (copy / "d").rename(copy / "kept")
        os.replace(copy / "kept", copy / "d")  # noqa: PTH105
        (copy / change).open("a").write("more")
        assert open_source(DataConfig(source=str(copy))).identity != first
        assert not prepared(copy).from_cache
    (copy / "x").mkdir()
    for name, kinds in (("x/1", (".jsonl", ".txt")), ("x/2", (".txt", ".jsonl"))):
        (copy / name).mkdir()
        for stem, kind in zip("ab", kinds, strict=True):
            (copy / name / f"{stem}{kind}").write_text('{"text": "a"}\n')
    one, two = (open_source(DataConfig(source=str(copy / "x" / name))) for name in "12")
    assert one.identity != two.identity
    assert list(one.training) != list(two.training)


@pytest.fixture
def saved(folder: Path, offline: None) -> Path:
    """Datasets as `datasets` saves them: one in two files, and one with two splits."""
    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"n": list(range(20)), "text": [*LETTERS[:19], ""], "other": LETTERS[:20]})
    rows.save_to_disk(folder / "one", num_shards=2)
    held_out = datasets.Dataset.from_dict({"n": [1] * 6, "text": LETTERS[20:], "other": LETTERS[20:]})
    datasets.DatasetDict({"train": rows, "test": held_out}).save_to_disk(folder / "two")
    datasets.enable_progress_bars()
    return folder


def test_a_saved_dataset_is_read_row_by_row(prepared: Prepare, saved: Path) -> None:
    assert documents(saved / "one") == LETTERS[:19]
    assert documents(saved / "one", text_column="other") == LETTERS[:20]
    assert documents(saved / "two" / "test") == LETTERS[20:]
    corpus = prepared(saved / "one")
    both = corpus.train.ids.tobytes() + corpus.validation.ids.tobytes()
    assert sorted(both.decode("latin-1").split("\xff")[:-1]) == LETTERS[:19]
    assert prepared(saved / "one").from_cache


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_dataset_validates_on_its_own_split(prepared: Prepare, saved: Path, streaming: bool) -> None:
    corpus = prepared(saved / "two", streaming=streaming)
    assert corpus.train.ids.tobytes().decode("latin-1").split("\xff")[:-1] == LETTERS[:19]
    assert corpus.validation.ids.tobytes().decode("latin-1").split("\xff")[:-1] == LETTERS[20:]
    assert documents(saved / "two", split="test", streaming=streaming) == LETTERS[20:]


def test_a_position_in_a_saved_dataset_is_exact(saved: Path) -> None:
    source = open_source(DataConfig(source=str(saved / "one"), streaming=True))
    everything = list(source.training.read())
    for index, (_, position) in enumerate(everything):
        assert [text for text, _ in source.training.read(position)] == LETTERS[index + 1 : 19]


def test_a_saved_dataset_is_known_by_its_rows(saved: Path) -> None:
    import shutil

    import datasets

    first = open_source(DataConfig(source=str(saved / "two"))).identity
    shutil.copytree(saved / "two", saved / "copy")
    assert open_source(DataConfig(source=str(saved / "copy"))).identity == first
    other = datasets.load_from_disk(saved / "two")
    other["test"] = other["test"].map(lambda row: {"text": row["text"].upper()})
    other.save_to_disk(saved / "other")
    assert open_source(DataConfig(source=str(saved / "other"))).identity != first, "the held-out rows count too"


def test_faults_of_a_saved_dataset_are_one_sentence(saved: Path) -> None:
    with pytest.raises(DataError, match=r"has no split 'dev'; choose --data-split from train, test$"):
        documents(saved / "two", split="dev")
    with pytest.raises(DataError, match=r"has no column 'body'; choose --text-column from n, text, other$"):
        documents(saved / "one", text_column="body")
    with pytest.raises(DataError, match=r"^the column 'n' of .* holds int64, not text; choose another --text-column$"):
        documents(saved / "one", text_column="n")
    arrow = next((saved / "one").glob("*.arrow"))
    whole = arrow.read_bytes()
    for damaged in (whole[:400], whole[:-8], b"", b"no arrow at all", whole[:200] + whole[-8:]):
        arrow.write_bytes(damaged)
        with pytest.raises(DataError, match=r"^[^\n]*\.arrow cannot be read \([^\n]*\); mend the file, or give"):
            documents(saved / "one")
    (saved / "two" / "train" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"^[^\n]*looks like a dataset of save_to_disk and cannot be read [^\n]*$"):
        documents(saved / "two")
