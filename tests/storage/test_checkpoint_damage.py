import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cda_cli.errors import CheckpointError
from cda_cli.storage.checkpoint import load, publish, verify
from cda_cli.storage.manifest import MAX_HEADER_BYTES, MAX_MANIFEST_BYTES, write_manifest


@pytest.fixture
def checkpoint(tmp_path: Path, contents) -> Path:
    return publish(tmp_path / "run", **contents(1))


def refusal(check: Callable[[Path], object], checkpoint: Path, change: str) -> str:
    """What `check` says against the checkpoint; the test fails with `change` where it says nothing."""
    try:
        check(checkpoint)
    except CheckpointError as error:
        return str(error)
    return pytest.fail(f"accepted: {change}")


def test_every_byte_of_the_manifest_counts(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        file.write_bytes(changed)
        refusal(verify, checkpoint, f"manifest.json, a bit of byte {place} flipped")


def test_only_one_spelling_of_the_manifest_is_accepted(checkpoint: Path) -> None:
    file = checkpoint / "manifest.json"
    whole = file.read_bytes()
    for change, spelling in {
        "no line end": whole[:-1],
        "a space more": b" " + whole,
        "spaces within": whole.replace(b":", b": "),
        "a key twice": whole.replace(b'"format":1', b'"format":9,"format":1'),
        "an escape": whole.replace(b"state.json", b"st\\u0061te.json"),
        "too long": whole + b" " * MAX_MANIFEST_BYTES,
    }.items():
        assert spelling != whole
        file.write_bytes(spelling)
        assert f"{file} is " in refusal(verify, checkpoint, f"a manifest with {change}")


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "tokenizer.json", "manifest.json"])
def test_a_file_that_is_missing_or_no_file_is_named(checkpoint: Path, tmp_path: Path, name: str) -> None:
    file = checkpoint / name
    outside = shutil.move(file, tmp_path / "outside")
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify(checkpoint)
    file.symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        verify(checkpoint)
    file.unlink()
    file.mkdir()
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        verify(checkpoint)
    file.rmdir()
    os.mkfifo(file)  # opening it would wait for ever
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        verify(checkpoint)


def _written(content: object) -> bytes:
    return (json.dumps(content, sort_keys=True, separators=(",", ":")) + "\n").encode()


_HOSTILE_NAMES = ["../secret", "../../secret", "sub/../../secret", "pickle.bin", "", ".", "model.safetensors/x", "\0"]


@pytest.mark.parametrize("name", [*_HOSTILE_NAMES, "absolute"])
def test_a_manifest_that_names_other_files_opens_none_of_them(checkpoint: Path, tmp_path, watch, name: str) -> None:
    secret = tmp_path / "run" / "secret"
    secret.write_bytes(b"secret")
    (checkpoint / "pickle.bin").write_bytes(b"secret")
    content = json.loads((checkpoint / "manifest.json").read_bytes())
    content["files"][str(secret) if name == "absolute" else name] = {"sha256": "0" * 64, "size": 6}
    (checkpoint / "manifest.json").write_bytes(_written(content))
    opened: list[str] = []
    with (
        watch(lambda event, path: opened.append(f"{event} {path}")),
        pytest.raises(CheckpointError, match="which is no file of a checkpoint"),
    ):
        load(checkpoint)
    assert opened == [f"open {checkpoint / 'manifest.json'}"]


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"format": 1},
        {"files": [], "format": 1},
        {"files": {}, "format": 1},
        {"files": {"state.json": 3}, "format": 1},
        {"files": {"state.json": {"sha256": None, "size": 3}}, "format": 1},
        {"files": {"state.json": {"sha256": "", "size": True}}, "format": 1},
        {"files": {}, "format": 2},
        {"files": {}, "format": True},
        {"files": {}, "format": 1, "more": 1},
    ],
)
def test_a_manifest_of_another_shape_is_refused(checkpoint: Path, content: object) -> None:
    (checkpoint / "manifest.json").write_bytes(_written(content))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(checkpoint)


@pytest.mark.parametrize("data", [b"", b"[" * 60_000, b"\xff\xfe", b"1" * 60_000, b"NaN\n"])
def test_a_manifest_that_is_no_json_is_refused(checkpoint: Path, data: bytes) -> None:
    (checkpoint / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"manifest\.json is "):
        verify(checkpoint)


@pytest.mark.parametrize("name", ["notes.txt", ".hidden", "model.bin"])
def test_a_file_that_the_manifest_does_not_know_is_refused(checkpoint: Path, name: str) -> None:
    (checkpoint / name).touch()
    with pytest.raises(CheckpointError, match=f"{name} is not in the manifest of its checkpoint; move it"):
        verify(checkpoint)


def _header(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\x80\x04cposix\nsystem\n."),
        ("model.safetensors", (2**62).to_bytes(8, "little")),
        ("model.safetensors", _header("{")),
        ("model.safetensors", _header("[" * 50_000)),
        ("model.safetensors", _header('{"a":{"dtype":"F99","shape":[],"data_offsets":[0,0]}}')),
        ("model.safetensors", _header('{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}')),
        ("model.safetensors", _header('{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}')),
        ("state.json", b"[]"),
        ("state.json", b'{"a": NaN}'),
        ("state.json", b"[" * 200_000),
        ("state.json", b"\xff"),
        ("state.json", b"{"),
        ("tokenizer.json", b"\xff"),
    ],
)
def test_a_malformed_file_with_a_fitting_manifest_is_refused(checkpoint: Path, name: str, data: bytes) -> None:
    (checkpoint / name).write_bytes(data)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=name):
        load(checkpoint)


def test_a_manifest_is_bounded_before_it_is_read(checkpoint: Path, watch) -> None:
    os.truncate(checkpoint / "manifest.json", MAX_MANIFEST_BYTES + 1)
    opened: list[str] = []
    with watch(lambda event, path: opened.append(path)), pytest.raises(CheckpointError, match="is larger than"):
        verify(checkpoint)
    assert opened == []


def test_a_header_is_bounded_before_it_is_parsed(checkpoint: Path) -> None:
    with (checkpoint / "model.safetensors").open("wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 9)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has a header of more than"):
        verify(checkpoint)
