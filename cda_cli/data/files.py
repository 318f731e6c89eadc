"""A local file → its text. The first bytes say how to unpack it; what is not text in its encoding is refused.

The name of a file plays no part here: a gzip file is one under any name, and a plain file under the name of one is
plain.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO, cast

from cda_cli.errors import DataError, brief

UTF8 = "utf-8"
HEAD_BYTES = 4096
READ_BYTES = 1 << 20
BOMS = {  # the longer ones first, as one begins with the other
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
WIDE = ("utf-16", "utf-32")  # English text in these encodings is half or more NUL bytes
ARCHIVES = {
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"Rar!\x1a\x07": "rar",
    b"\x1f\x9d": "compress",
    b"\x1f\xa0": "compress",
    b"\xff\x06\x00\x00sNaPpY": "snappy",
    b"LZIP": "lzip",
}
TAR = (257, b"ustar")


class NotTextError(DataError):
    """The content of a file is not text, or not in the encoding that was named."""


def compression(head: bytes) -> str | None:
    """The compression of a file that begins with `head`, if it is one that can be read, else None."""
    if head.startswith(b"\x1f\x8b\x08"):
        return "gzip"
    # "BZh9" alone may begin a text; after it comes the number of a block, or of the end.
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90"):
        return "bz2"
    if head.startswith(b"\xfd7zXZ\x00"):
        return "xz"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "zstd"
    if head.startswith(b"\x04\x22\x4d\x18"):
        return "lz4"
    return None


def head_of(path: Path) -> bytes:
    """The first HEAD_BYTES of a file, as they lie on the disk. Raises OSError."""
    with path.open("rb") as file:
        return file.read(HEAD_BYTES)


@contextmanager
def open_text(path: Path, encoding: str, newline: str, *, may_hold_nul: bool = True) -> Iterator[TextIO]:
    """The text of a file, unpacked and decoded strictly, without a UTF-8 byte-order mark at its beginning.

    `newline` is that of `open`; "" and "\\n" leave every line ending as it is. Unless it `may_hold_nul`, a file whose
    beginning has a NUL byte counts as binary, but in the encodings WIDE. Raises DataError, also inside the block,
    if the file cannot be read or unpacked, and NotTextError if it is an archive or holds no text in `encoding`.
    """
    strict = f"{UTF8}-sig" if encoding == UTF8 else encoding
    try:
        with _unpacked(path) as file:
            _check_head(path, file.peek(HEAD_BYTES)[:HEAD_BYTES], encoding, may_hold_nul)
            yield io.TextIOWrapper(file, encoding=strict, newline=newline)
    except UnicodeError as error:
        raise NotTextError(
            f"{path} is not {encoding}{_place(path, encoding)}; name its encoding with --encoding, or give --data "
            "files of text"
        ) from error
    except file_errors() as error:
        raise DataError(f"{path} cannot be read ({brief(error)}); mend the file, or give --data another") from error


def check_is_text(path: Path, encoding: str) -> None:
    """Raises DataError as `open_text` does if the beginning of a file, whose name promises no text, is not text."""
    with open_text(path, encoding, newline="", may_hold_nul=False) as file:
        file.read(HEAD_BYTES)


def file_errors() -> tuple[type[BaseException], ...]:
    """The errors that reading, unpacking or parsing a damaged file raises."""
    import pyarrow as pa  # type: ignore[import-untyped]

    return (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, pa.ArrowException)


@contextmanager
def _unpacked(path: Path) -> Iterator[io.BufferedReader]:
    with path.open("rb") as packed:
        name = compression(packed.peek(HEAD_BYTES))
        opened = _UNPACKERS[name](packed) if name else packed
        yield io.BufferedReader(cast(io.RawIOBase, opened), READ_BYTES)


def _arrow(codec: str) -> Callable[[IO[bytes]], Any]:
    def unpack(file: IO[bytes]) -> Any:
        import pyarrow as pa

        return pa.CompressedInputStream(file, codec)

    return unpack


_UNPACKERS: dict[str, Callable[[IO[bytes]], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": bz2.BZ2File,
    "xz": lzma.LZMAFile,
    "zstd": _arrow("zstd"),
    "lz4": _arrow("lz4"),
}


def _check_head(path: Path, head: bytes, encoding: str, may_hold_nul: bool) -> None:
    """Raises NotTextError for bytes that decode without an error but are no text in `encoding`, or no text at all."""
    archive = next((name for magic, name in ARCHIVES.items() if head.startswith(magic)), None)
    if head[TAR[0] :].startswith(TAR[1]):
        archive = "tar"
    if archive:
        raise NotTextError(
            f"{path} is a {archive} archive, which is not read; unpack it, and give --data what was in it"
        )
    if encoding.startswith(WIDE):
        return
    wide = next((name for mark, name in BOMS.items() if head.startswith(mark)), None)
    if wide:
        raise NotTextError(
            f"{path} begins with the byte-order mark of {wide}, at byte 0; read it with --encoding {wide}"
        )
    if not may_hold_nul and 0 in head:
        raise NotTextError(f"{path} is binary, not text (byte {head.index(0)} is NUL); give --data files of text")
    if len(head) >= 4 and head.count(0) * 4 >= len(head):
        order = "le" if head[1::2].count(0) >= head[::2].count(0) else "be"
        raise NotTextError(
            f"{path} is full of NUL bytes, from byte {head.index(0)} on, as UTF-16 without a byte-order mark is; read "
            f"it with --encoding utf-16-{order}, or give --data another file"
        )


def _place(path: Path, encoding: str) -> str:
    """The place, in the unpacked file, of the first bytes that are not `encoding`.

    It reads the file again, as the decoder knows the place within its buffer only.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    done, lines = 0, 1
    with _unpacked(path) as file:
        while True:
            chunk = file.read(READ_BYTES)
            waiting = len(decoder.getstate()[0])
            try:
                lines += decoder.decode(chunk, final=not chunk).count("\n")
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(encoding, errors="replace")
                return f" at byte {done - waiting + error.start}, line {lines + before.count(chr(10))}"
            except UnicodeError:
                return ""
            if not chunk:
                return ""
            done += len(chunk)
