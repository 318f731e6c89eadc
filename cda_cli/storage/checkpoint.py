"""Checkpoints that survive a kill at any moment.

    RUN/checkpoints/step-00000100/
        model.safetensors  optimizer.safetensors  rng.safetensors  state.json  manifest.json
        [ema.safetensors  tokenizer.json]

Several processes write weights, moments and average in shards (see `shards`), such as model-00001-of-00004.safetensors.

A checkpoint is published whole (see `atomic`) and verified before it is used (see `manifest`). No pointer to the latest
one could go stale: `newest` verifies from the highest step down.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cda_cli.errors import CheckpointError
from cda_cli.storage.atomic import published_folder, remove_published, remove_stale
from cda_cli.storage.manifest import (
    AVERAGE,
    MANIFEST,
    WEIGHTS,
    DamagedError,
    damaged,
    recorded_sha256,
    shards_of,
    verify,
    write_manifest,
)
from cda_cli.storage.optimizer_state import pack_optimizer, unpack_optimizer
from cda_cli.storage.run_files import CHECKPOINTS
from cda_cli.storage.shards import ALONE, Group, write_shards
from cda_cli.storage.tensors import check_fits, open_tensors, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "PARTS",
    "STATE_FILE",
    "Checkpoint",
    "best",
    "check_fits",
    "list_steps",
    "load",
    "locate",
    "newest",
    "pack_optimizer",
    "publish",
    "recorded_sha256",
    "step_folder",
    "unpack_optimizer",
    "verify",
]

PARTS = ("model", "optimizer", "rng", "ema")
STATE_FILE = "state.json"

_STEP = re.compile(r"step-([0-9]{8})")
_ALWAYS_KEPT = 2
_log = logging.getLogger(__name__)

VALIDATION_LOSS = "validation_loss"  # key in a checkpoint's state: the loss at its step, or None if not measured


@dataclass
class Checkpoint:
    """The contents of a checkpoint. Tensors are on the CPU. A part that was not asked for is an empty dict.

    `ema`, the moving average of the weights, is empty too if there is none. In a checkpoint that is only opened, each
    of `model`, `optimizer` and `ema` is a `StoredTensor` in place of a tensor.
    """

    path: Path
    model: dict[str, Any]
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]
    ema: dict[str, Any]
    state: dict[str, Any]
    tokenizer_json: str | None

    def release(self) -> None:
        """Forgets the tensors, which frees their memory and closes the files of those that are not read yet.

        The disk keeps the content of a file that is open, even once the checkpoint is removed.
        """
        for part in (self.model, self.optimizer, self.rng, self.ema):
            part.clear()


def step_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`, whether it exists or not."""
    if not 0 <= step < 10**8:
        raise ValueError(f"step {step} does not fit the eight digits of a checkpoint's name")
    return Path(run) / CHECKPOINTS / f"step-{step:08d}"


def list_steps(run: Path) -> list[int]:
    """The steps that have a checkpoint folder, damaged ones included, lowest first."""
    folder = Path(run) / CHECKPOINTS
    try:
        if not folder.is_dir():
            return []
        names = [entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read ({error.strerror}); allow reading it") from error
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def publish(
    run: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    rng: Mapping[str, Tensor],
    state: Mapping[str, Any],
    tokenizer_json: str | None = None,
    ema: Mapping[str, Tensor] | None = None,
    keep: int = 2,
    keep_best: bool = False,
    group: Group = ALONE,
) -> Path:
    """Saves a checkpoint, only then removes old ones, and returns its folder.

    Each process of a `group` calls it with its rows of the tensors of `model`, `optimizer` and `ema` (see `own_rows`),
    and the first returns once all is published. Another returns once it has written its shards.

    A checkpoint of this step that already verifies stays as it is: a resumed run reaches the same state again, and
    replacing it would mean a moment without it. A damaged one is removed first.

    Of the others, the newest `keep` that verify stay (never fewer than two), and so does whatever is newer than those.
    With `keep_best`, the one that `best` finds stays too, and any that the disk fails to read this time. The rest goes,
    damaged or not. Names other than `step-` and eight digits are never touched.

    Raises StorageError if a write fails; the earlier checkpoints are then whole. Raises ValueError or TypeError for a
    `state` that JSON does not return as it was (NaN, a tuple, a key that is no string).
    """
    path = step_folder(run, step)
    files = {WEIGHTS: model, "optimizer.safetensors": optimizer} | ({AVERAGE: ema} if ema is not None else {})
    if group.rank:
        if hidden := group.broadcast(None):
            group.gather(write_shards(Path(hidden), files, group))
        return path
    state_json = _encode_state(state)
    remove_stale(path.parent)
    if _already_published(path):
        group.broadcast(None)
    else:
        with published_folder(path) as folder:
            group.broadcast(str(folder))
            shards = group.gather(write_shards(folder, files, group))
            write_tensors(folder / "rng.safetensors", rng)
            (folder / STATE_FILE).write_bytes(state_json)
            if tokenizer_json is not None:
                (folder / "tokenizer.json").write_bytes(tokenizer_json.encode())
            write_manifest(folder, dict(ChainMap(*shards)), group.count)
    _prune(run, keep=max(keep, _ALWAYS_KEPT), keep_best=keep_best, published=path)
    return path


def load(path: Path, parts: Collection[str] = PARTS) -> Checkpoint:
    """Loads the checkpoint folder `path`, with only those tensors that `parts` names.

    It first checks the SHA-256 of every file that it loads, state.json and tokenizer.json always among them. A file
    that it does not load must exist with its size, and is not read.

    Raises CheckpointError if the checkpoint is missing or damaged.
    """
    path = Path(path)
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ValueError(f"a checkpoint has no part {sorted(unknown)[0]!r}; its parts are {', '.join(PARTS)}")
    present = verify(path, {STATE_FILE, "tokenizer.json", *map(_file_of, parts)})
    return _checkpoint(path, present, {part: _read(path, shards_of(_file_of(part), present)) for part in parts})


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a checkpoint as `load` does, but reads weights, moments and average only when they are asked for.

    A file with some of them is checked before the first is read from it.
    """
    path = Path(path)
    present = verify(path, {STATE_FILE, "tokenizer.json", _file_of("rng")})
    digests = recorded_sha256(path)
    tensors: dict[str, dict[str, Any]] = {
        part: open_tensors([path / name for name in shards_of(_file_of(part), present)], digests)
        for part in ("model", "optimizer", "ema")
    }
    return _checkpoint(path, present, tensors | {"rng": _read(path, [_file_of("rng")])})


def _file_of(part: str) -> str:
    return f"{part}.safetensors"


def _read(path: Path, names: list[str]) -> dict[str, Tensor]:
    """The tensors of a file of a verified checkpoint, or of the shards that stand for it. Of no file there are none."""
    if len(names) == 1:
        return read_tensors(path / names[0])
    return {name: tensor.read() for name, tensor in open_tensors([path / name for name in names]).items()}


def _checkpoint(path: Path, present: Collection[str], tensors: Mapping[str, dict[str, Any]]) -> Checkpoint:
    return Checkpoint(
        path=path,
        model=tensors.get("model", {}),
        optimizer=tensors.get("optimizer", {}),
        rng=tensors.get("rng", {}),
        ema=tensors.get("ema", {}),
        state=_decode_state(path / STATE_FILE),
        tokenizer_json=_read_text(path / "tokenizer.json") if "tokenizer.json" in present else None,
    )


def newest(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of `run` that verifies, or None; and for each newer one what is wrong with it."""
    passed_over: list[str] = []
    for step in reversed(list_steps(run)):
        path = step_folder(run, step)
        try:
            verify(path)
        except DamagedError as error:
            passed_over.append(error.fault)
        except CheckpointError as error:
            passed_over.append(str(error))
        else:
            return path, passed_over
    return None, passed_over


def best(run: Path) -> Path | None:
    """The checkpoint of `run` that verifies and has the lowest validation loss in its state, the newest of equals."""
    return _best_and_unread(run)[0]


def _best_and_unread(run: Path, known: Collection[Path] = ()) -> tuple[Path | None, set[Path]]:
    """What `best` returns, and the checkpoints that the disk failed to read, each of which may be better.

    The checkpoints in `known` have been verified already.
    """
    found: list[tuple[float, int]] = []
    unread: set[Path] = set()
    for step in list_steps(run):
        path = step_folder(run, step)
        try:
            loss = load(path, parts=()).state.get(VALIDATION_LOSS)
        except CheckpointError as error:
            if _is_unread(error):
                unread.add(path)
            continue
        if isinstance(loss, float):
            found.append((loss, -step))
    # The few kilobytes of a state tell which is best. Only the best is read whole.
    for path in (step_folder(run, -step) for _, step in sorted(found)):
        try:
            if path not in known:
                verify(path)
        except CheckpointError as error:
            if _is_unread(error):
                unread.add(path)
        else:
            return path, unread
    return None, unread


def _is_unread(error: CheckpointError) -> bool:
    """Whether the disk failed to read, which another try may not meet, rather than returned damaged data."""
    return isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)


def locate(path: Path, warn: Callable[[str], object] = _log.warning) -> Path:
    """The checkpoint folder that a user means by `path`: a checkpoint itself, a run, or a run's `checkpoints`.

    For a run it is the newest that verifies, and `warn` gets a sentence for each damaged one passed over. A
    checkpoint that `path` names itself is verified by `load`, not here.

    Raises CheckpointError with the remedy if there is none.
    """
    path = Path(path)
    try:
        return _locate(path, warn)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); allow reading it") from error


def _is_another_tools(path: Path) -> bool:
    """Whether `path`, which is no run, is a model that `cda import` takes."""
    if path.is_dir():
        return (path / "config.json").is_file()
    return path.suffix == ".gguf" if path.exists() else str(path).startswith("hf:")


def _no_run(path: Path) -> str:
    if _is_another_tools(path):
        return f"{path} is a model of another tool; `cda import {shlex.quote(str(path))} --out RUN` makes a run of it"
    if not path.exists():
        return f"{path} does not exist; give a run's folder or one of its checkpoints"
    if not path.is_dir():
        return f"{path} is a file; give the folder of the checkpoint or of the run"
    return f"{path} is not a run (it has no folder {CHECKPOINTS}); give the folder that `train` wrote"


def _locate(path: Path, warn: Callable[[str], object]) -> Path:
    if (_STEP.fullmatch(path.name) and path.is_dir()) or os.path.lexists(path / MANIFEST):
        return path
    run = path.resolve().parent if path.resolve().name == CHECKPOINTS else path
    if not (run / CHECKPOINTS).is_dir():
        raise CheckpointError(_no_run(path))
    found, passed_over = newest(run)
    if found is not None:
        for sentence in passed_over:
            warn(sentence)
        return found
    if passed_over:
        raise CheckpointError(f"no checkpoint of {run} is whole: {passed_over[0]}; copy the run afresh")
    raise CheckpointError(f"{run} has no checkpoint yet; train until it has saved one")


def _already_published(path: Path) -> bool:
    if not os.path.lexists(path):
        return False
    if path.is_symlink() or not _is_whole(path):
        remove_published(path)
        return False
    return True


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _prune(run: Path, *, keep: int, keep_best: bool, published: Path) -> None:
    """Removes old checkpoints. `published` is known to be whole: its files were read a moment ago."""
    whole: set[Path] = set()
    spared, doomed = {published}, []
    for step in reversed(list_steps(run)):
        path = step_folder(run, step)
        if len(whole) >= keep:
            doomed.append(path)
        elif path == published or _is_whole(path):
            whole.add(path)
    if doomed and keep_best:
        found, unread = _best_and_unread(run, whole)
        spared |= unread | ({found} if found else set())
    for path in doomed:
        if path not in spared:
            remove_published(path)


def _encode_state(state: Mapping[str, Any]) -> bytes:
    text = json.dumps(dict(state), allow_nan=False)
    # JSON turns tuples into lists, and numbers as keys into strings. That must not surprise a resumed run.
    if json.loads(text) != dict(state):
        raise TypeError("the state of a checkpoint holds a tuple, or a key that is no string: JSON would change it")
    return text.encode("ascii") + b"\n"


def _decode_state(file: Path) -> dict[str, Any]:
    try:
        state = json.loads(_read_text(file), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise damaged(file, f"is not JSON ({type(error).__name__})") from error
    if not isinstance(state, dict):
        raise damaged(file, "is not a JSON object")
    return state


def _refuse_constant(word: str) -> object:
    raise ValueError(f"{word} is not JSON")


def _read_text(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(file, f"cannot be read ({type(error).__name__})") from error
