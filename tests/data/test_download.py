"""`--data https://…`: from a real server on this machine into the cache, whole or not at all, and once."""

from __future__ import annotations

import gzip
import http.server
import json
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import pytest

from cda_cli.config import DataConfig
from cda_cli.data import ByteTokenizer, PreparationStoppedError, StreamedBatches, download, open_source, prepare
from cda_cli.data.sources import absolute_source, is_there
from cda_cli.errors import DataError, StorageError
from tests.data.samples import LETTERS, Prepare
from tests.data.test_files import PACK

TEXT = ("some text, naïve λ. " * 200).encode()
ROWS = "".join(json.dumps({"text": row}) + "\n" for row in LETTERS).encode()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves `files`, and odd answers under a few names; `asked` are the paths that were asked for."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.lstrip("/").partition("?")[0]
        if name == "moved.txt":
            self.send_response(302)
            self.send_header("Location", "/a.txt")
            self.end_headers()
        elif name in ("301.txt", "307.txt", "308.txt"):  # leads to what stands behind the question mark
            self.send_response(int(name[:3]))
            self.send_header("Location", self.path.partition("?")[2])
            self.end_headers()
        elif name == "silent.txt":
            self.server.released.wait(30)  # type: ignore[attr-defined]
        elif name == "nonsense.txt":
            self.wfile.write(b"no HTTP\r\n")
        elif name == "part.txt":
            self.send_response(206)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(TEXT[:4])
        elif name in ("page.jsonl", "login"):
            self._answer(b"<html>log in</html>", "text/html; charset=utf-8")
        elif name in ("cut.txt", "chunked-cut.txt"):
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            if name == "cut.txt":
                self.send_header("Content-Length", str(len(TEXT)))
                self.end_headers()
                self.wfile.write(TEXT[:1000])
            else:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                self.wfile.write(b"100\r\n" + TEXT[:100])
        elif name in self.files:
            self._answer(self.files[name], "application/octet-stream")
        else:
            self.send_error(404)

    def _answer(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if not self.path.endswith("?unsized"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Says nothing."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that has the `files` of Handler."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Handler.asked.clear()
    Handler.files.clear()
    Handler.files.update({"a.txt": TEXT, "rows.jsonl": ROWS, "deep/file": TEXT})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.released = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.released.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def encrypted_site(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server with TLS that has the `files` of Handler too."""
    pem = tmp_path / "server.pem"
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", pem)
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-out", tmp_path / "certificate.pem")
    subprocess.run(["openssl", "req", "-x509", "-days", "2", *key, *names], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", pem)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"https://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def documents(source: str, **settings: object) -> list[str]:
    return list(open_source(DataConfig(source=source, **settings)).training)


@pytest.mark.parametrize("name", ["a.txt", "deep/file", "moved.txt", "a.txt?unsized", "a.txt?download=1"])
def test_a_text_is_downloaded_once(prepared: Prepare, site: str, name: str) -> None:
    corpus = prepared(f"{site}/{name}")
    assert corpus.train.ids.tobytes() + corpus.validation.ids.tobytes() == TEXT + b"\xff"
    assert corpus.description == f"{site}/{name}"
    asked = len(Handler.asked)
    assert prepared(f"{site}/{name}").from_cache
    assert len(Handler.asked) == asked, "it was downloaded again"


@pytest.mark.parametrize("code", [301, 307, 308])
def test_a_redirect_is_followed(site: str, code: int) -> None:
    assert documents(f"{site}/{code}.txt?{site}/a.txt") == [TEXT.decode()]


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/a.txt", "file:///etc/hostname", "mailto:a"])
def test_a_redirect_to_another_protocol_is_one_sentence(site: str, cache: Path, target: str) -> None:
    with pytest.raises(DataError, match=rf"cannot be downloaded \([^\n]*{target}[^\n]*\); check the address[^\n]*$"):
        documents(f"{site}/301.txt?{target}")
    assert not list(cache.glob("downloads/*"))


def test_a_redirect_does_not_give_up_encryption(site: str, encrypted_site: str) -> None:
    assert documents(f"{encrypted_site}/301.txt?/a.txt") == [TEXT.decode()]
    assert documents(f"{site}/301.txt?{encrypted_site}/a.txt") == [TEXT.decode()]
    with pytest.raises(DataError, match=rf"cannot be downloaded \(the server redirects to {site}/a\.txt, which is not"):
        documents(f"{encrypted_site}/301.txt?{site}/a.txt")


@pytest.mark.parametrize("codec", PACK)
def test_packed_text_and_tables_are_read_by_their_endings(site: str, codec: str) -> None:
    Handler.files |= {"b.txt.pack": PACK[codec](TEXT), "rows.jsonl.zst": PACK[codec](ROWS), "c.gz": PACK[codec](TEXT)}
    assert documents(f"{site}/b.txt.pack") == [TEXT.decode()]
    assert documents(f"{site}/c.gz") == [TEXT.decode()]
    assert documents(f"{site}/rows.jsonl.zst") == documents(f"{site}/rows.jsonl") == LETTERS


def test_a_checksum_must_be_that_of_the_file(site: str, cache: Path) -> None:
    right, wrong = sha256(TEXT).hexdigest(), sha256(b"").hexdigest()
    assert documents(f"{site}/a.txt#sha256={right.upper()}") == [TEXT.decode()]
    kept = sorted(cache.glob("downloads/*"))
    with pytest.raises(DataError, match=rf"^{site}/a\.txt has the SHA-256 {right}, not {wrong}; mend the checksum"):
        documents(f"{site}/a.txt#sha256={wrong}")
    assert sorted(cache.glob("downloads/*")) == kept, "a file of another checksum was kept"
    assert [path.name for path in cache.rglob(".tmp-*")] == []


def test_a_damaged_copy_is_downloaded_again(site: str, cache: Path) -> None:
    documents(f"{site}/a.txt")
    (copy,) = cache.glob("downloads/*/a.txt")
    copy.write_bytes(TEXT[:100])
    assert documents(f"{site}/a.txt") == [TEXT.decode()]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing.txt", r"cannot be downloaded \(the server answers 404 Not Found\); check the address$"),
        ("cut.txt", r"broke off after 1,000 of \d,\d+ bytes; run again to download it anew$|IncompleteRead"),
        ("chunked-cut.txt", r"cannot be downloaded \(IncompleteRead.*\); check the address and the network, or give"),
        ("nonsense.txt", r"cannot be downloaded \(.*\); check the address and the network, or give --data a local"),
        ("page.jsonl", r"gives a web page and no \.jsonl; give the address of the file itself$"),
        ("login", r"gives a web page and no text; give the address of the file itself$"),
        ("a.txt#section", r"ends in #section; write #sha256= and 64 hexadecimal digits, or leave it out$"),
        ("a b.txt", r"is no address of a file; write --data https://HOST/PATH, percent-encoded$"),
        ("naïve.txt", r"is no address of a file; "),
        ("picture.png", r"picture\.png is binary, not text \(byte 8 is NUL\); give --data files of text$"),
        ("cut.zst", r"cut\.zst cannot be read \(.*\); mend the file, or give --data another$"),
        ("part.txt", r"cannot be downloaded \(the server answers 206 Partial Content\); check the address$"),
        ("empty.txt", r"empty\.txt is empty; give the address of a file that holds text$"),
    ],
)
def test_faults_are_one_sentence_and_leave_no_part(
    prepared: Prepare, site: str, cache: Path, name: str, sentence: str
) -> None:
    Handler.files |= {
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "cut.zst": PACK["zstd"](bytes(range(128)) * 5000)[:-20],
        "empty.txt": b"",
    }
    with pytest.raises(DataError, match=sentence) as caught:
        prepared(f"{site}/{name}")
    assert "\n" not in str(caught.value)
    whole = [path.name for path in cache.glob("downloads/*/[!.]*")]
    assert whole == ([name] if Handler.files.get(name) else [])
    assert not list(cache.rglob(".tmp-*"))


def test_no_server_and_no_answer_are_one_sentence(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DataError, match=r"cannot be downloaded \(.*Connection refused\); check the address and the"):
        documents(f"http://127.0.0.1:{port}/a.txt")
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(DataError, match=r"silent\.txt cannot be downloaded \(no answer for 0\.2 s\); check"):
        documents(f"{site}/silent.txt")
    for address in ("http://", "https:///a.txt", "http://host:port/a"):
        with pytest.raises(DataError, match="is no address of a file; write --data https://HOST/PATH"):
            documents(address)


@pytest.mark.parametrize("error", [PreparationStoppedError, KeyboardInterrupt])
def test_a_stopped_download_leaves_nothing(site: str, cache: Path, error: type[BaseException]) -> None:
    def stop() -> bool:
        if error is KeyboardInterrupt:
            raise error
        return True

    with pytest.raises(error):
        prepare(DataConfig(source=f"{site}/a.txt"), show_progress=False, should_stop=stop)
    assert not list(cache.glob("downloads/*"))
    assert not list(cache.glob("downloads/.tmp*"))


def test_a_full_or_closed_cache_is_one_sentence(site: str, cache: Path) -> None:
    cache.write_text("a file in the place of the folder")
    with pytest.raises(StorageError, match=r"^no downloads: could not write .*; CDA_CACHE can name another folder"):
        documents(f"{site}/a.txt")


def test_a_dry_run_leaves_the_cache_alone(site: str, cache: Path, tmp_path: Path) -> None:
    prepare(DataConfig(source=f"{site}/a.txt"), show_progress=False, spare_cache=tmp_path / "spare")
    assert not cache.exists()
    assert Handler.asked == ["/a.txt"]


def test_a_download_is_the_same_text_as_the_file_and_streams_from_any_position(site: str, folder: Path) -> None:
    (folder / "rows.jsonl").write_bytes(ROWS)
    config = DataConfig(source=f"{site}/rows.jsonl", streaming=True)
    local = DataConfig(source=str(folder / "rows.jsonl"), streaming=True)
    assert open_source(config).identity == open_source(local).identity
    through = list(islice(StreamedBatches(config, ByteTokenizer(), 16, 2), 30))
    for at in (0, 11, 25):
        for data in (config, local):
            batch, state = next(StreamedBatches(data, ByteTokenizer(), 16, 2, through[at][1]))
            assert batch.inputs.equal(through[at + 1][0].inputs)
            assert state == through[at + 1][1]
    assert Handler.asked == ["/rows.jsonl"]


def test_a_long_name_that_is_not_ascii_is_kept_short(site: str) -> None:
    """A file system counts 255 bytes, and not characters."""
    name = quote("本" * 95 + ".txt")
    Handler.files[name] = TEXT
    assert documents(f"{site}/{name}") == [TEXT.decode()]


def test_an_address_is_no_path(site: str) -> None:
    assert absolute_source(f"{site}/a.txt#sha256=0") == f"{site}/a.txt#sha256=0"
    assert is_there(f"{site}/a.txt")


def test_a_packed_download_is_kept_as_it_came(site: str, cache: Path) -> None:
    Handler.files["a.txt.gz"] = gzip.compress(TEXT)
    documents(f"{site}/a.txt.gz")
    (copy,) = cache.glob("downloads/*/a.txt.gz")
    assert copy.read_bytes() == Handler.files["a.txt.gz"]
