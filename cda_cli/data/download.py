"""An address → a local file, downloaded into the cache once."""

from __future__ import annotations

import http
import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple
from urllib.parse import unquote, urlsplit

from cda_cli.data.cache import Preparation
from cda_cli.data.fingerprint import digest
from cda_cli.data.row_readers import PACKED, kind_by_name
from cda_cli.errors import DataError, brief

SCHEMES = ("http://", "https://")
TIMEOUT_SECONDS = 60.0  # for a connection, and for each part that is read
PAGES = (".html", ".htm")  # Whoever names one of these wants the page.
READ_BYTES = 1 << 18
NAME_CHARACTERS = 100
META_FILE = ".download.json"  # no name of a download begins with a dot


class Address(NamedTuple):
    """Where a file is; `checksum` is the SHA-256 that it must have, in lower-case hex, or None."""

    url: str
    checksum: str | None

    @classmethod
    def parse(cls, source: str) -> Address:
        """Reads `http(s)://HOST/PATH[#sha256=HEX]`. Raises DataError."""
        url, _, fragment = source.partition("#")
        matched = re.fullmatch("sha256=([0-9a-fA-F]{64})", fragment)
        if fragment and not matched:
            raise DataError(f"{source} ends in #{fragment}; write #sha256= and 64 hexadecimal digits, or leave it out")
        try:
            parts = urlsplit(url)
            named = bool(parts.hostname) and parts.port != 0
        except ValueError:  # such as a port that is no number
            named = False
        if not named or not url.isascii() or re.search(r"[\s\x00-\x1f]", url):
            raise DataError(f"{source} is no address of a file; write --data https://HOST/PATH, percent-encoded")
        return cls(url, matched[1].lower() if matched else None)

    @property
    def name(self) -> str:
        """A name for the local file, in ASCII, as a file system counts bytes; it ends as the address does."""
        last = unquote(PurePosixPath(urlsplit(self.url).path).name)
        return re.sub(r"[^\w.-]", "_", last, flags=re.ASCII)[-NAME_CHARACTERS:].lstrip(".") or "download"


def is_address(source: str) -> bool:
    return source.lower().startswith(SCHEMES)


def _is_encrypted(url: str) -> bool:
    return url.lower().startswith("https://")


def downloaded(source: str, preparation: Preparation) -> Path:
    """The local copy of the file at the address `source`, downloaded if the cache does not have it.

    Raises DataError if the file cannot be had whole or has another checksum than `source` says, and StorageError if the
    cache cannot be written. Nothing is left behind then.
    """
    address = Address.parse(source)
    path, _ = preparation.cached(
        "downloads",
        digest(*address),
        "downloads",
        load=lambda folder: _find(folder, address),
        make=lambda folder: _download(folder, address, preparation),
    )
    return path


def _find(folder: Path, address: Address) -> Path | None:
    """The copy in `folder`; None if it is absent or damaged."""
    path = folder / address.name
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        whole = 0 < path.stat().st_size == meta["bytes"] and address.checksum in (None, meta["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return path if whole else None


def _download(folder: Path, address: Address, preparation: Preparation) -> None:
    """Writes the file and its meta data into `folder`."""
    found, size = sha256(), 0
    with _response(address) as response, (folder / address.name).open("wb") as file:
        expected = response.length
        with preparation.bar("download", expected) as bar:
            while part := _read(response, address):
                file.write(part)
                found.update(part)
                size += len(part)
                bar.update(len(part))
                preparation.check()
    if expected is not None and size != expected:
        raise DataError(f"{address.url} broke off after {size:,} of {expected:,} bytes; run again to download it anew")
    if not size:
        raise DataError(f"{address.url} is empty; give the address of a file that holds text")
    if address.checksum not in (None, found.hexdigest()):
        raise DataError(
            f"{address.url} has the SHA-256 {found.hexdigest()}, not {address.checksum}; mend the checksum after #, or "
            "find out who changed the file"
        )
    meta = {"url": address.url, "bytes": size, "sha256": found.hexdigest()}
    (folder / META_FILE).write_text(json.dumps(meta, indent=2), encoding="utf-8")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to one of SCHEMES, but not from https to http."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # which Python 3.10 lacks

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not is_address(newurl) or (_is_encrypted(req.full_url) and not _is_encrypted(newurl)):
            fp.close()
            raise ValueError(f"the server redirects to {newurl}, which is not allowed")
        # Python 3.10 refuses 308, which means the same as 307 here.
        return super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)


@contextmanager
def _response(address: Address) -> Iterator[http.client.HTTPResponse]:
    request = urllib.request.Request(address.url, headers={"User-Agent": "cda-cli"})
    with _explained(address):
        response = urllib.request.build_opener(_Redirects).open(request, timeout=TIMEOUT_SECONDS)
    with response:
        if response.status != http.HTTPStatus.OK:  # such as a part of the file, 206
            raise DataError(
                f"{address.url} cannot be downloaded (the server answers {response.status} {response.reason}); check "
                "the address"
            )
        ending = PurePosixPath(address.name).suffix.lower()
        if ending not in PAGES and response.headers.get_content_type() == "text/html":
            wanted = ending if ending in PACKED or kind_by_name(address.name) else "text"
            raise DataError(f"{address.url} gives a web page and no {wanted}; give the address of the file itself")
        yield response


def _read(response: http.client.HTTPResponse, address: Address) -> bytes:
    with _explained(address):
        return response.read(READ_BYTES)


@contextmanager
def _explained(address: Address) -> Iterator[None]:
    """Turns what the network raises into a DataError, so that it is not taken for a fault of the disk."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        raise DataError(
            f"{address.url} cannot be downloaded (the server answers {error.code} {error.reason}); check the address"
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            fault = f"no answer for {TIMEOUT_SECONDS:g} s"
        else:
            fault = brief(cause) if isinstance(cause, BaseException) else str(cause)
        raise DataError(
            f"{address.url} cannot be downloaded ({fault}); check the address and the network, or give --data a local "
            "file"
        ) from error
