"""The manifest of a checkpoint: the size and SHA-256 of each of its files, and the check against it.

No tensor format notices a flipped bit, so the manifest does. It shows accidents, not intent: whoever can write the
folder can write a manifest that fits. A fixed set of names, the refusal of links, bounds on what is parsed, and formats
that run no code protect against hostile files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cda_cli.errors import CheckpointError
from cda_cli.plurals import counted

FORMAT, SHARDED_FORMAT = 1, 2
MANIFEST = "manifest.json"
WEIGHTS, AVERAGE = "model.safetensors", "ema.safetensors"  # the weights, and their moving average
REQUIRED = frozenset({WEIGHTS, "optimizer.safetensors", "rng.safetensors", "state.json"})
OPTIONAL = frozenset({"tokenizer.json", AVERAGE})
# The files that a checkpoint of several processes cuts into shards, one for each process.
SHARDED = frozenset({WEIGHTS, "optimizer.safetensors", AVERAGE})

# Bounds on what is parsed in one piece; our own files stay far below them.
MAX_MANIFEST_BYTES = 1024**2
MAX_HEADER_BYTES = 8 * 1024**2
MAX_JSON_BYTES = 256 * 1024**2
_CHUNK = 1024**2

_SHARD = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}(\.safetensors)")


class Content(NamedTuple):
    """What the manifest says of a file."""

    size: int
    sha256: str


class DamagedError(CheckpointError):
    """`fault` is its sentence without the remedy, which depends on what else there is in the run."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"{fault}; use an earlier checkpoint of the run, or copy this one afresh")
        self.fault = fault


def damaged(path: Path, fault: str) -> DamagedError:
    """The error for `path`, a file or folder of a checkpoint."""
    return DamagedError(f"{path} {fault}")


def shard_name(file: str, rank: int, count: int) -> str:
    """The name of the shard that process `rank` of `count` writes of `file`; a single process writes `file` itself."""
    if count == 1:
        return file
    stem, _, ending = file.rpartition(".")
    return f"{stem}-{rank + 1:05d}-of-{count:05d}.{ending}"


def shards_of(file: str, names: Collection[str]) -> list[str]:
    """Those of the `names` of a checkpoint that hold the tensors of `file`, in order: the file, or its shards."""
    return sorted(name for name in names if _whole_name(name) == file)


def _whole_name(name: str) -> str:
    """The file that `name` is a shard of, or else `name`."""
    match = _SHARD.fullmatch(name)
    return match[1] + match[2] if match else name


def content_of(file: Path) -> Content:
    """What the manifest will say of `file`. Raises OSError."""
    return Content(file.stat().st_size, sha256_of(file))


def write_manifest(folder: Path, shards: Mapping[str, Content] | None = None, count: int = 1) -> None:
    """Writes the manifest of `folder`, a checkpoint of `count` processes that is not published yet.

    It lists the `shards`, whose content is known, and every other file in the folder.
    """
    known = dict(shards or {})
    paths = [path for path in folder.iterdir() if path.name not in known]
    digests = _sha256_of(paths)
    known |= {path.name: Content(path.stat().st_size, digests[path]) for path in paths}
    content: dict[str, Any] = {"files": {name: one._asdict() for name, one in known.items()}, "format": FORMAT}
    if count > 1:
        content |= {"format": SHARDED_FORMAT, "shards": count}
    (folder / MANIFEST).write_bytes(_canonical(content))


def verify(path: Path, hashed: Collection[str] = REQUIRED | OPTIONAL) -> frozenset[str]:
    """Checks the checkpoint folder `path` and returns the names of its files.

    It checks names, kinds and sizes of all files, and the SHA-256 of those in `hashed`, by the names of whole files. It
    only ever opens regular files of the known names.

    Raises a CheckpointError that names the file, its fault and the remedy.
    """
    path = Path(path)
    try:
        entries = _read_manifest(path)
        _check_names(path, entries)
        for name, content in sorted(entries.items()):
            _check_size(path / name, content.size)
        digests = _sha256_of([path / name for name in sorted(entries) if _whole_name(name) in hashed])
        for file, digest in digests.items():
            _check_content(file, digest, entries[file.name].sha256)
    except OSError as error:
        broken = Path(os.fsdecode(error.filename)) if error.filename is not None else path
        raise damaged(broken, f"cannot be read ({error.strerror})") from error
    return frozenset(entries)


def recorded_sha256(path: Path) -> dict[str, str]:
    """The SHA-256 of each file of the checkpoint folder `path`, by its name, as the manifest has them.

    Where shards stand for a file, its name has the SHA-256 of theirs, in order. It does not look at the files. Raises
    CheckpointError as `verify` does.
    """
    try:
        entries = _read_manifest(Path(path))
        digests = {name: content.sha256 for name, content in entries.items()}
        for file in SHARDED - digests.keys():
            if shards := shards_of(file, entries):
                digests[file] = hashlib.sha256("".join(digests[name] for name in shards).encode()).hexdigest()
        return digests
    except OSError as error:
        raise damaged(Path(path), f"cannot be read ({error.strerror})") from error


def verify_file(file: Path, sha256: str) -> None:
    """Checks one file of a checkpoint as `verify` does, given what `recorded_sha256` says of it."""
    try:
        _check_content(file, sha256_of(file), sha256)
    except OSError as error:
        raise damaged(file, f"cannot be read ({error.strerror})") from error


def _read_manifest(path: Path) -> dict[str, Content]:
    file = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint at {path}; give a run's folder or one of its checkpoints")
    if _regular_size(file) > MAX_MANIFEST_BYTES:
        raise damaged(file, f"is larger than {MAX_MANIFEST_BYTES} bytes")
    data = file.read_bytes()
    try:
        content = json.loads(data)
        # Only one spelling is accepted, so a flipped bit in the manifest itself is always seen.
        if _canonical(content) != data:
            raise damaged(file, "is not as it was written")
    except (ValueError, RecursionError) as error:
        raise damaged(file, "is not as it was written") from error
    if not isinstance(content, dict) or not {"files", "format"} <= content.keys() <= {"files", "format", "shards"}:
        raise damaged(file, "is not a manifest")
    if type(content["format"]) is not int or content["format"] not in (FORMAT, SHARDED_FORMAT):
        raise CheckpointError(
            f"{file} has format {content['format']!r} and this version reads {FORMAT} and {SHARDED_FORMAT}; "
            "use the version of cda that wrote it, or an earlier checkpoint"
        )
    if (content["format"] == SHARDED_FORMAT) != ("shards" in content):
        raise damaged(file, "is not a manifest")
    return _entries(file, content["files"], content.get("shards", 1))


def _entries(file: Path, files: Any, count: Any) -> dict[str, Content]:
    if not isinstance(files, dict) or type(count) is not int or not 1 <= count <= len(files):
        raise damaged(file, "is not a manifest")

    cut = [name for name in SHARDED if name in REQUIRED or shards_of(name, files)]
    required = (REQUIRED - SHARDED).union(shard_name(name, rank, count) for name in cut for rank in range(count))
    entries = {}
    for name, entry in files.items():
        if name not in required | OPTIONAL:
            raise damaged(file, f"lists {name!r}, which is no file of a checkpoint")
        if not isinstance(entry, dict) or entry.keys() != {"sha256", "size"}:
            raise damaged(file, f"says nothing usable about {name}")
        size, sha256 = entry["size"], entry["sha256"]
        if type(size) is not int or not isinstance(sha256, str):
            raise damaged(file, f"says nothing usable about {name}")
        entries[name] = Content(size, sha256)
    for name in sorted(required - entries.keys()):
        raise damaged(file, f"does not list {name}")
    return entries


def _check_names(path: Path, entries: Collection[str]) -> None:
    present = {entry.name for entry in path.iterdir()}
    for name in sorted(present - set(entries) - {MANIFEST}):
        raise CheckpointError(f"{path / name} is not in the manifest of its checkpoint; move it elsewhere")


def _check_size(file: Path, size: int) -> None:
    actual = _regular_size(file)
    if actual != size:
        raise damaged(file, f"has {counted(actual, 'byte')} instead of {size:,}")
    if file.suffix == ".json" and size > MAX_JSON_BYTES:
        raise damaged(file, f"is larger than {MAX_JSON_BYTES} bytes")


def _check_content(file: Path, found: str, sha256: str) -> None:
    if found != sha256:
        raise damaged(file, "is damaged (its SHA-256 is not the manifest's)")
    if file.suffix == ".safetensors":
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        if header > MAX_HEADER_BYTES:
            raise damaged(file, f"has a header of more than {MAX_HEADER_BYTES} bytes")


def _regular_size(file: Path) -> int:
    try:
        status = file.lstat()
    except FileNotFoundError as error:
        raise damaged(file, "is missing") from error
    if not stat.S_ISREG(status.st_mode):
        raise damaged(file, "is not a regular file")
    return status.st_size


def _sha256_of(files: Sequence[Path]) -> dict[Path, str]:
    """Hashes in threads: hashing does not hold the interpreter, and most of a checkpoint is in two or three files."""
    with ThreadPoolExecutor(max_workers=4) as threads:
        return dict(zip(files, threads.map(sha256_of, files), strict=True))


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _canonical(content: Any) -> bytes:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"
