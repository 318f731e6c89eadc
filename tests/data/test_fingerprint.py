"""What tells one text from another: every edit of small files, ordinary edits of large ones, and no change of place."""

from __future__ import annotations

import os
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.config import DataConfig
from cda_cli.data import fingerprint, open_source, sources
from tests.data.samples import Prepare


def replace_unseen(path: Path, content: bytes) -> None:
    """Another file in the place of `path`, with its size and time."""
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(content)
    assert other.stat().st_size == before.st_size
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def overwrite_unseen(path: Path, content: bytes) -> None:
    """Other bytes in the same file, with its size and time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.fixture(params=[False, True], ids=["whole", "sampled"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a kilobyte are small, or too large to be read whole."""
    if request.param:
        monkeypatch.setattr(fingerprint, "WHOLE_BYTES", 64)
        monkeypatch.setattr(sources, "WHOLE_BYTES", 64)
        monkeypatch.setattr(fingerprint, "CHUNK_BYTES", 16)


@pytest.mark.parametrize("change", [replace_unseen, overwrite_unseen])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_tokens_of_what_a_file_held_before_are_not_taken(
    prepared: Prepare, folder: Path, large: None, name: str, change: object
) -> None:
    content = b"".join(b'{"text": "%04d"}\n' % number for number in range(100))
    (folder / name).write_bytes(content)
    first = prepared(folder / name)
    assert prepared(folder / name).from_cache
    middle = len(content) // 2 - len(content) // 2 % 17 + 10
    change(folder / name, content[:middle] + b"9999" + content[middle + 4 :])  # type: ignore[operator]
    second = prepared(folder / name)
    assert not second.from_cache, "the tokens of another text were taken"
    both = second.train.ids.tobytes() + second.validation.ids.tobytes()
    assert b"9999" in both
    assert (first.train.digest, first.validation.digest) != (second.train.digest, second.validation.digest)


def test_the_same_small_text_elsewhere_is_in_the_cache(prepared: Prepare, folder: Path) -> None:
    (folder / "a.txt").write_text("some text " * 50)
    first = prepared(folder / "a.txt")
    (folder / "deep").mkdir()
    shutil.move(folder / "a.txt", folder / "deep" / "b.txt")
    second = prepared(folder / "deep" / "b.txt")
    assert second.from_cache
    assert second.train.digest == first.train.digest


SIZES = {"WHOLE_BYTES": 100, "CHUNK_BYTES": 8, "FEWEST_CHUNKS": 3}


def identity(folder: Path, contents: list[bytes]) -> object:
    folder.mkdir(exist_ok=True)
    for index, content in enumerate(contents):
        (folder / f"{index}.txt").write_bytes(content)
    return open_source(DataConfig(source=str(folder / "*.txt"))).identity


@given(
    st.lists(st.binary(min_size=1, max_size=60), min_size=1, max_size=4), st.data(), st.sampled_from(["edit", "swap"])
)
def test_every_edit_of_small_files_is_seen_and_no_copy(
    tmp_path_factory: pytest.TempPathFactory, contents: list[bytes], data: st.DataObject, change: str
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    changed = list(contents)
    if change == "swap":
        changed = data.draw(st.permutations(contents))
    else:
        which = data.draw(st.integers(0, len(contents) - 1))
        edited = bytearray(contents[which])
        edited[data.draw(st.integers(0, len(edited) - 1))] ^= data.draw(st.integers(1, 255))
        changed[which] = bytes(edited)
    first = identity(folder / "a", contents)
    assert identity(folder / "b", contents) == first, "a copy is another text"
    assert (identity(folder / "c", changed) == first) == (changed == contents)


@pytest.mark.parametrize("size", [101, 200, 399])
def test_of_large_files_the_ends_are_seen_and_places_evenly_between(
    folder: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    for name, value in SIZES.items():
        monkeypatch.setattr(fingerprint, name, value)
    path = folder / "a.txt"

    def digest_of(content: bytes) -> str:
        path.write_bytes(content)
        return fingerprint.content_digest([path], [len(content)])

    first = digest_of(b"a" * size)
    seen = [place for place in range(size) if digest_of(b"a" * place + b"b" + b"a" * (size - place - 1)) != first]
    assert digest_of(b"a" * (size + 1)) != first
    assert seen[:8] == [*range(8)]
    assert seen[-8:] == [*range(size - 8, size)]
    assert max(after - before for before, after in pairwise(seen)) <= size // 12 + 1
    assert len(seen) < size or size < 105


def test_large_files_are_read_in_part_only(folder: Path) -> None:
    """A stream of many gigabytes must begin at once."""
    with (folder / "a.jsonl").open("wb") as file:
        file.write(b'{"text": "a"}\n')
        file.seek(1 << 40)  # a hole, which takes no room on the disk
        file.write(b"\n")
    first = open_source(DataConfig(source=str(folder / "a.jsonl"), streaming=True)).identity
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b"\n")
    assert open_source(DataConfig(source=str(folder / "a.jsonl"), streaming=True)).identity != first
