"""A file is what its bytes say: packed or plain under any name, and text or no text."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cda_cli.config import DataConfig
from cda_cli.data import Corpus, StreamedBatches, load_tokenizer, open_source
from cda_cli.errors import ConfigError, DataError
from tests.data.samples import LETTERS, UNICODE, Prepare


def arrow(codec: str) -> Callable[[bytes], bytes]:
    def pack(data: bytes) -> bytes:
        import pyarrow as pa

        packed = io.BytesIO()
        packed.close = lambda: None  # type: ignore[method-assign] - closing would throw the bytes away
        with pa.CompressedOutputStream(packed, codec) as file:
            file.write(data)
        return packed.getvalue()

    return pack


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": arrow("zstd"),
    "lz4": arrow("lz4"),
}


def plain(corpus: Corpus) -> bytes:
    return corpus.train.ids.tobytes() + corpus.validation.ids.tobytes()


def rows_of(ending: str, rows: list[str] = LETTERS) -> bytes:
    """A file of that ending which holds `rows`."""
    if ending == ".csv":
        file = io.StringIO(newline="")
        csv.writer(file).writerows([["n", "text"], *([1, row] for row in rows)])
        return file.getvalue().encode()
    objects = [{"text": row} for row in rows]
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)
    return (json.dumps(objects, ensure_ascii=False) if ending == ".json" else lines).encode()


@pytest.mark.parametrize("codec", PACK)
@pytest.mark.parametrize("name", ["a.txt", "A.TXT.GZ", "a.gz", "a.txt.xz", "a.TXT.Bz2", "a.zst", "a.txt.lz4"])
def test_a_packed_text_is_unpacked_whatever_it_is_called(
    prepared: Prepare, folder: Path, codec: str, name: str
) -> None:
    content = UNICODE.encode() * 50
    (folder / name).write_bytes(PACK[codec](content))
    assert plain(prepared(folder / name)) == content + b"\xff"


@pytest.mark.parametrize("name", ["a.txt.gz", "A.GZ", "a.xz", "a.txt.zst"])
def test_a_plain_text_is_taken_as_it_is_whatever_it_is_called(prepared: Prepare, folder: Path, name: str) -> None:
    content = b"BZh9 begins some text, and so it begins here. " * 20
    (folder / name).write_bytes(content)
    assert plain(prepared(folder / name)) == content + b"\xff"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("packing", ["gzip", "zstd", None])
def test_tables_are_unpacked_alike(folder: Path, streaming: bool, ending: str, packing: str | None) -> None:
    """One named as it is, one in capitals, one as if it were plain; and read on from within each."""
    content = rows_of(ending)
    for name in (f"a{ending}.gz", f"B{ending.upper()}.GZ", f"c{ending}"):
        (folder / name).write_bytes(PACK[packing](content) if packing else content)
    config = DataConfig(source=str(folder / "*"), streaming=streaming)
    documents = list(open_source(config).training.read())
    assert [text for text, _ in documents] == LETTERS * 3
    for at in (5, 30, 60):
        again = open_source(config).training.read(documents[at][1])
        assert [text for text, _ in again] == (LETTERS * 3)[at + 1 :]


@pytest.mark.parametrize("codec", PACK)
def test_what_is_packed_and_damaged_is_one_sentence(prepared: Prepare, folder: Path, codec: str) -> None:
    import random

    packed = PACK[codec](random.Random(0).randbytes(50_000))
    for name, content in (("cut.txt", packed[: len(packed) // 2]), ("bad.jsonl", packed[:100] + b"\0" * 9000)):
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"^[^\n]*{name}[^\n]*; mend ") as caught:
            prepared(folder / name)
        assert str(folder / name) in str(caught.value)


def tar_of(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def zip_of(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.txt", tar_of(b"text " * 1000), "tar"),
        ("a.txt.gz", gzip.compress(tar_of(b"text " * 1000)), "tar"),
        ("a.jsonl", zip_of(b"text"), "zip"),
        ("a.csv", b"7z\xbc\xaf\x27\x1c rest", "7z"),
    ],
)
def test_an_archive_is_named(prepared: Prepare, folder: Path, name: str, content: bytes, kind: str) -> None:
    """A tar of texts is nothing but text and NUL bytes, and would train."""
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"is a {kind} archive, which is not read; unpack it, and give --data"):
        prepared(folder / name)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("far", [0, 3_000_000])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".csv"])
def test_what_is_not_utf8_is_refused_with_its_place(
    folder: Path, ending: str, pack: Callable[[bytes], bytes], far: int, streaming: bool
) -> None:
    """At the beginning, and far into a file, where a reader has long given out rows."""
    start = b"text\n" if ending == ".csv" else b""
    row = b'{"text": "some \xc3\xa9"}\n' if ending == ".jsonl" else b"some \xc3\xa9\n"
    before = start + row * (far // len(row) + 1)
    for name in ("a", "b"):
        (folder / f"{name}{ending}").write_bytes(pack(before + row.replace(b"\xc3\xa9", b"\xe9")))
    documents = open_source(DataConfig(source=str(folder / f"*{ending}"), streaming=streaming)).training
    place = len(before) + row.index(b"\xc3")
    lines = before.count(b"\n") + 1
    with pytest.raises(DataError, match=rf"a{ending} is not utf-8 at byte {place}, line {lines}; name its encoding"):
        list(documents)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "utf-8-sig"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv"])
def test_another_encoding_is_decoded_where_it_is_named(
    prepared: Prepare, folder: Path, encoding: str, ending: str
) -> None:
    rows = [f"café {row}" for row in LETTERS]
    content = (("\n".join(rows)).encode() if ending == ".txt" else rows_of(ending, rows)).decode().encode(encoding)
    (folder / f"a{ending}").write_bytes(content)
    (folder / f"b{ending}").write_bytes(gzip.compress(content))
    config = DataConfig(source=str(folder / f"?{ending}"), encoding=encoding)
    documents = list(open_source(config).training.read())
    assert [text for text, _ in documents] == (["\n".join(rows)] if ending == ".txt" else rows) * 2
    for index, (_, position) in enumerate(documents):
        rest = [text for text, _ in open_source(config).training.read(position)]
        assert rest == [text for text, _ in documents[index + 1 :]]
    if encoding != "utf-8-sig":
        with pytest.raises(DataError, match="--encoding"):
            list(open_source(DataConfig(source=config.source)).training)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("given", ["utf-8", "latin-1"])
def test_a_byte_order_mark_names_the_encoding(
    prepared: Prepare, folder: Path, encoding: str, name: str, given: str
) -> None:
    (folder / name).write_bytes("text of some length".encode(encoding))
    with pytest.raises(DataError, match=rf"begins with the byte-order mark of {encoding}.*--encoding {encoding}$"):
        prepared(folder / name, encoding=given)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_wide_text_without_a_mark_is_not_taken_for_utf8(prepared: Prepare, folder: Path, encoding: str) -> None:
    """English in UTF-16 is valid UTF-8, every second character a NUL."""
    (folder / "a.txt").write_bytes(("plain English text. " * 100).encode(encoding))
    with pytest.raises(DataError, match=rf"is full of NUL bytes, from byte \d on, .* --encoding {encoding}"):
        prepared(folder / "a.txt")


def test_a_mark_of_utf8_is_left_out_and_a_genuine_replacement_character_stays(prepared: Prepare, folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + "genuine \ufffd, \ufeff and \x00. ".encode() * 20)
    assert plain(prepared(folder / "a.txt")) == "genuine \ufffd, \ufeff and \x00. ".encode() * 20 + b"\xff"


@pytest.mark.parametrize("name", ["klingon", "base64", "rot13", "", "utf-8\0", "hex"])
def test_an_unknown_encoding_is_one_sentence(name: str) -> None:
    from cda_cli.config import parse

    with pytest.raises(ConfigError, match=r"there is no encoding .* of text in Python; give one such as"):
        parse({"data": {"encoding": name}})


def test_an_encoding_has_one_name_and_its_own_tokens(prepared: Prepare, folder: Path) -> None:
    assert DataConfig(encoding="UTF8") == DataConfig()
    (folder / "a.txt").write_bytes("café ".encode() * 100)
    first = prepared(folder / "a.txt")
    other = prepared(folder / "a.txt", encoding="latin-1")
    assert not other.from_cache, "the cached tokens of another encoding were taken"
    assert plain(first) != plain(other)
    assert prepared(folder / "a.txt", encoding="ISO-8859-1").from_cache


def test_a_stream_of_another_encoding_is_another_stream(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(rows_of(".jsonl"))
    config: dict[str, Any] = {"source": str(folder / "a.jsonl"), "streaming": True}
    tokenizer = load_tokenizer("bytes")
    _, state = next(StreamedBatches(DataConfig(**config), tokenizer, 16, 2))
    with pytest.raises(DataError, match="resume with the data"):
        StreamedBatches(DataConfig(**config, encoding="cp1252"), tokenizer, 16, 2, state)
