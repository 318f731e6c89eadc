"""A run or checkpoint from a stranger is data: no code in it runs, and nothing outside of it is touched.

Whoever can write a file can write a manifest that fits, so each manifest here does.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from cda_cli.storage import locate
from cda_cli.storage.manifest import _canonical, sha256_of
from tests.commands.helpers import Result, run_cda
from tests.reliability.damage import finished_run
from tests.reliability.harness import FORKS, exit_code, start
from tests.reliability.variants import broken

Change = Callable[[Path, Path], None]  # of a checkpoint, with the file that must not be touched

SECONDS = 60.0


class Payload:
    """An object that, if it is unpickled, writes into the file that must not be touched."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"echo touched >> {self.canary}",))


def written(name: str, make: Callable[[Path], bytes]) -> Change:
    """Writes one file in place of another, with its entry in the manifest."""

    def change(checkpoint: Path, canary: Path) -> None:
        (checkpoint / name).write_bytes(make(canary))
        fit_manifest(checkpoint)

    return change


def fit_manifest(checkpoint: Path) -> None:
    files = {
        file.name: {"sha256": sha256_of(file), "size": file.stat().st_size}
        for file in checkpoint.iterdir()
        if file.name != "manifest.json" and file.is_file()
    }
    (checkpoint / "manifest.json").write_bytes(_canonical({"files": files, "format": 1}))


def header(text: str, data: bytes = b"") -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + data


def torch_pickle(canary: Path) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"w": Payload(canary)}, Path(folder) / "x")
        return (Path(folder) / "x").read_bytes()


def state(**changes: object) -> Change:
    """Writes a state.json with something hostile in it."""

    def change(checkpoint: Path, canary: Path) -> None:
        content = json.loads((checkpoint / "state.json").read_bytes())
        for name, value in changes.items():
            merge = isinstance(value, dict) and isinstance(content[name], dict)
            content[name] = content[name] | value if merge else value
        (checkpoint / "state.json").write_text(json.dumps(content))
        fit_manifest(checkpoint)

    return change


def yaml_call(canary: Path) -> bytes:
    return f"run: !!python/object/apply:os.system ['echo touched >> {canary}']\n".encode()


IMPORTS = {"_instantiator": "os.system", "_target_": "os.system", "auto_map": {"AutoModel": "evil.Model"}}
TENSOR_PARTS = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")
BYTES: list[tuple[str, str, Callable[[Path], bytes]]] = [
    *[(part, "a pickle", lambda canary: pickle.dumps(Payload(canary))) for part in TENSOR_PARTS],
    *[(part, "an old pickle", lambda canary: pickle.dumps(Payload(canary), protocol=0)) for part in TENSOR_PARTS],
    *[(part, "a file of torch.save", torch_pickle) for part in TENSOR_PARTS],
    *[(part, "no header", lambda canary: b"") for part in TENSOR_PARTS],
    *[(part, "a header of 4 exabytes", lambda canary: (2**62).to_bytes(8, "little")) for part in TENSOR_PARTS],
    *[(part, "a header that is deep", lambda canary: header("[" * 100_000)) for part in TENSOR_PARTS],
    *[
        (part, "a tensor of 2⁶⁴ values", lambda canary: header(
            '{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'))
        for part in TENSOR_PARTS
    ],
    *[
        (part, "a tensor beyond the file", lambda canary: header(
            '{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'))
        for part in TENSOR_PARTS
    ],
    *[
        (part, "tensors of one place", lambda canary: header(
            '{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
            bytes(4)))
        for part in TENSOR_PARTS
    ],
    *[
        (part, "other tensors than the model's", lambda canary: header(
            '{"w":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)))
        for part in TENSOR_PARTS
    ],
    ("state.json", "a pickle", lambda canary: pickle.dumps(Payload(canary))),
    ("state.json", "deep lists", lambda canary: b"[" * 100_000),
    ("state.json", "deep objects", lambda canary: b'{"config":' * 50_000),
    ("state.json", "tags of YAML", lambda canary: b"config:\n  " + yaml_call(canary)),
    ("state.json", "a list", lambda canary: b"[1]"),
    ("state.json", "infinity", lambda canary: b'{"step": 1e999, "config": {}}'),
    ("state.json", "a huge number", lambda canary: b'{"step": ' + b"9" * 100_000 + b', "config": {}}'),
    ("tokenizer.json", "a pickle", lambda canary: pickle.dumps(Payload(canary))),
    ("tokenizer.json", "deep lists", lambda canary: b"[" * 100_000),
    ("tokenizer.json", "names to import", lambda canary: json.dumps(IMPORTS).encode()),
    ("tokenizer.json", "no vocabulary", lambda canary: b"{}"),
]  # fmt: skip

STATES: list[tuple[str, Change]] = [
    ("names to import", state(config=IMPORTS)),
    ("names to import in the optimizer", state(optimizer=IMPORTS)),
    ("no moments", state(optimizer={"state": {}, "param_groups": []})),
    ("a step that is a text", state(step="8")),
    ("a step of another planet", state(step=10**30)),
    ("a model that is a number", state(config={"model": 3})),
    ("a model of exabytes", state(config={"model": {"dim": 2**40, "heads": 1, "vocab_size": 2**40}})),
    ("a position that never comes", state(position={"position": 10**15})),
    ("a position before the first", state(position={"position": -1, "epoch": -1})),
    ("a position of another shape", state(position={"position": [], "epoch": {}})),
]


COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "resume": lambda run, path: ["train", "--resume", path, "--out", run.parent / "branch"],
    "train": lambda run, path: ["train", "--out", run, "--steps", 10],
    "sample": lambda run, path: ["sample", path, "--prompt", "a", "--max-new-tokens", 1],
    "eval": lambda run, path: ["eval", path, "--max-batches", 1],
}


def files(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Commands read hostile files in a checkpoint whose manifest fits: they print one sentence, and no code runs."""
    chance = random.Random(seed)
    cases: list[tuple[str, Change]] = [(f"{name}: {what}", written(name, make)) for name, what, make in BYTES]
    cases += [(f"state.json: {what}", change) for what, change in STATES]
    cases += [("config.yaml: tags of YAML", hostile_configuration), ("config.yaml: deep lists", deep_configuration)]
    yield from tried(some(cases, count, chance, variant), variant)


def hostile_configuration(checkpoint: Path, canary: Path) -> None:
    (checkpoint.parents[1] / "config.yaml").write_bytes(yaml_call(canary))


def deep_configuration(checkpoint: Path, canary: Path) -> None:
    (checkpoint.parents[1] / "config.yaml").write_bytes(b"[" * 5_000)


def named_in_manifest(name: str) -> Change:
    def change(checkpoint: Path, canary: Path) -> None:
        content = json.loads((checkpoint / "manifest.json").read_bytes())
        named = str(canary) if name == "absolute" else name.replace("CANARY", os.path.relpath(canary, checkpoint))
        content["files"][named] = {"sha256": sha256_of(canary), "size": canary.stat().st_size}
        (checkpoint / "manifest.json").write_bytes(_canonical(content))

    return change


def linked(name: str, link: Callable[[Path, Path], None]) -> Change:
    """Makes a file of the checkpoint, or beside it, a link to the canary. The manifest fits what it links to."""

    def change(checkpoint: Path, canary: Path) -> None:
        place = Path(os.path.normpath(checkpoint / name))
        if place.is_file() and place.name != "manifest.json":
            canary.write_bytes(place.read_bytes())
        if os.path.lexists(place):
            place.unlink()
        link(canary, place)

    return change


def symlink(target: Path, place: Path) -> None:
    place.symlink_to(target)


def hard_link(target: Path, place: Path) -> None:
    place.hardlink_to(target)


def folder_link(name: str) -> Change:
    """Makes a name in the folder of checkpoints a link to a folder outside."""

    def change(checkpoint: Path, canary: Path) -> None:
        (checkpoint.parent / name).symlink_to(canary.parent)

    return change


def folder_named(name: str) -> Change:
    """Makes a folder of that name beside the checkpoint, which belongs to somebody and must stay."""

    def change(checkpoint: Path, canary: Path) -> None:
        shutil.copytree(canary.parent, checkpoint.parent / name)

    return change


NAMES: list[tuple[str, Change]] = [
    *[
        (f"{name!r} in the manifest", named_in_manifest(name))
        for name in ("CANARY", "absolute", "sub/../CANARY", "./CANARY", "model.safetensors/../CANARY", "", ".", "..",
                     "/dev/zero", "x\0y", "state.json/", "evil.py", "model.bin")
    ],
    *[
        (f"{name} is a link", linked(name, symlink))
        for name in ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "tokenizer.json",
                     "manifest.json", "../../.lock", "../../metrics.jsonl", "../../config.yaml")
    ],
    *[(f"{name} is a hard link", linked(name, hard_link)) for name in ("../../.lock", "../../metrics.jsonl")],
    *[
        (f"a link {name}", folder_link(name))
        for name in ("step-00000001", "step-00000099", ".tmp-step-00000001-999999999-0123abcd", "best")
    ],
    *[
        (f"a folder {name}", folder_named(name))
        for name in ("step-00000001.old", "step-1", "xstep-00000001", "step-000000012", ".tmp-mine")
    ],
]  # fmt: skip


def names(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Hostile names in a manifest, links, and folders of others beside the checkpoints lead nowhere.

    Nothing outside the run is read, written or removed, and no folder of others is.
    """
    chance = random.Random(seed)
    yield from tried(some(NAMES, count, chance, variant), variant)


# What a broken variant is shown, so that it is caught soon.
SHOWN = {
    "tensors unpickled": "a pickle", "YAML with tags": "config.yaml: tags", "links followed": "is a link",
    "any name in a manifest": "\\x00", "everything else pruned": "a folder",
}  # fmt: skip


def some(cases: list[tuple[str, Change]], count: int, chance: random.Random, variant: str) -> list[tuple[str, Change]]:
    """Returns `count` of the cases, or those that a broken variant must be caught with."""
    shown = [case for case in cases if SHOWN.get(variant, "") in case[0]]
    return chance.sample(shown, min(count, len(shown)))


def tried(cases: list[tuple[str, Change]], variant: str) -> Iterator[str | None]:
    """Tries each case with each command, in a child that notes what it touches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = finished_run(folder)
        for what, change in cases:
            faults = (fault_of(word, change, whole, folder, variant) for word in COMMANDS)
            fault = next(filter(None, faults), None)
            yield fault and f"{what}: {fault}"


def fault_of(word: str, change: Change, whole: Path, folder: Path, variant: str) -> str | None:
    here = folder / "here"
    run, outside = here / "run", here / "outside"
    shutil.copytree(whole, run)
    outside.mkdir()
    (outside / "canary").write_text("precious")
    path = locate(run)
    change(path, outside / "canary")
    before = contents(outside), contents_of_others(path)
    fault = command_fault(COMMANDS[word](run, path), folder / "cache", outside, variant)
    if not fault and (contents(outside), contents_of_others(path)) != before:
        fault = "something outside was changed"
    shutil.rmtree(here)
    return fault and f"`cda {word}`: {fault}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def contents_of_others(checkpoint: Path) -> dict[str, bytes]:
    """Returns the contents of what lies beside the checkpoints."""
    others = [path for path in checkpoint.parent.iterdir() if not path.is_symlink() and path.is_dir()]
    mine = [path for path in others if len(path.name) != len(checkpoint.name) or not path.name.startswith("step-")]
    return {name: data for path in mine for name, data in contents(path).items()}


def command_fault(arguments: list[object], cache: Path, outside: Path, variant: str) -> str | None:
    listener, said = FORKS.Pipe(duplex=False)
    child = start(watched, arguments, cache, outside, variant, said)
    said.close()
    result, touched = listener.recv() if listener.poll(SECONDS) else (None, [])
    code = exit_code(child)
    if result is None or code != 0:
        return f"no end, or a crash ({code})"
    if touched:
        return f"it touched {touched[0]}"
    if result.code not in (0, 2) or "Traceback" in result.err or "unexpected" in result.err:
        return f"it ended with {result.code} and said {result.err[-600:]!r}"
    return None


# What Python says of each, before it does it.
RUNS_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pickle.find_class", "ctypes.dlopen")
FOLLOWS = ("open", "os.listdir", "os.scandir", "os.chmod", "os.truncate", "os.utime")


def watched(arguments: list[object], cache: Path, outside: Path, variant: str, said: Connection) -> None:
    """Runs a command in a child, and says how it ended and which forbidden things it touched."""
    os.environ["CDA_CACHE"] = str(cache)
    touched: list[str] = []

    def note(event: str, given: tuple[Any, ...]) -> None:
        if event.startswith(RUNS_CODE):
            touched.append(f"{event} {given!r}"[:300])
        elif event == "open" and isinstance(given[2], int) and given[2] & os.O_NOFOLLOW:
            return
        elif event == "open" or event.startswith("os."):
            paths = [Path(one) for one in given if isinstance(one, (str, Path))]
            # What is removed or renamed is the link, and what is opened is where it leads.
            meant = [path.resolve() if event in FOLLOWS else path.parent.resolve() / path.name for path in paths]
            touched.extend(f"{event} {path}" for path in meant if path.is_relative_to(outside.resolve()))

    sys.addaudithook(note)
    with broken(variant):
        result: Result = run_cda(*arguments)
        noted = list(touched)
    said.send((result, noted))
