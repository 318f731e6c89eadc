"""Checkpoints survive what happens to the process that saves them, and to the disk: kills, faults, a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from cda_cli.errors import CdaError, StorageError
from cda_cli.storage import ALONE, Group, best, list_steps, load, newest, own_rows, publish, step_folder, verify
from tests.reliability.harness import FORKS, exit_code, start
from tests.reliability.moments import Moments, changing_calls, every_call
from tests.reliability.variants import broken

SIZE = 20_000  # values a tensor: a file of 80 kB, a checkpoint of 240 kB


def validation_loss(step: int) -> float:
    """Returns a loss that is lowest so far at steps 2, 7, 12 …

    The best checkpoint is then soon older than the two newest, which always stay.
    """
    return (step - 2) % 5 - step / 1000


def save(run: Path, step: int, group: Group = ALONE) -> Path:
    """Saves a checkpoint whose every value is its step. Of the others the newest and the best stay."""
    part = {"w": torch.full((SIZE,), float(step))[own_rows(SIZE, group.rank, group.count)]}
    state = {"step": step, "validation_loss": validation_loss(step)}
    return publish(
        run,
        step=step,
        model=part,
        optimizer=part,
        rng=part,
        state=state,
        tokenizer_json="{}",
        keep_best=True,
        group=group,
    )


def fault_of(run: Path, promised: int, spoilt: int | None = None) -> str | None:
    """Says what is wrong with a run in which all steps up to `promised` had been published.

    One of those or the best may be lost, or something visible may be incomplete (except step `spoilt`, which was
    damaged before).
    """
    for step in list_steps(run):
        try:
            verify(step_folder(run, step))
        except CdaError as error:
            if step != spoilt:
                return f"a checkpoint in sight is not whole: {error}"
    found, _ = newest(run)
    reached = number(found) if found else 0
    if reached < promised:
        return f"step {promised} had been published, and {reached} is the newest whole one"
    if found and not all(tensors["w"].eq(reached).all() for tensors in (load(found).model, load(found).optimizer)):
        return f"step {reached} holds other values than were saved"
    if promised:
        lowest, kept = min(range(1, promised + 1), key=validation_loss), best(run)
        if kept is None or validation_loss(number(kept)) > validation_loss(lowest):
            return f"step {lowest} had been the best published, and {kept} is the best whole one"
    return None


def number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def save_for_ever(run: Path, kill_at: int | None, variant: str, said: Connection) -> None:
    """Saves again and again in a child, and says each step once it is published, and each change of the disk.

    At moment `kill_at` of all its calls it kills itself. Without it, the parent does that.
    """
    step = max(list_steps(run), default=0)
    listening = kill_at is None

    def tell(frame: Any, event: str, arg: Any) -> bool:
        if listening and changing_calls(frame, event, arg):
            said.send_bytes(b".")
        return True

    with broken(variant), Moments(tell if listening else every_call, kill_at, kill_self):
        while True:
            step += 1
            save(run, step)
            said.send_bytes(b"%d" % step)


def kills(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Sends SIGKILL while a process saves, renames and prunes.

    The process kills itself at any of its calls, or is killed from outside at any time, even in the middle of a write.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        run, step = Path(folder), 0
        for trial in range(count):
            kill_at = chance.randrange(15_000) if trial % 2 else None
            changes = chance.randrange(1, 250)
            listener, said = FORKS.Pipe(duplex=False)
            child = start(save_for_ever, run, kill_at, variant, said)
            said.close()
            try:
                while True:
                    word = listener.recv_bytes()
                    step = int(word) if word != b"." else step
                    changes -= word == b"."
                    if kill_at is None and changes == 0:
                        child.kill()
            except EOFError:
                listener.close()
            code = exit_code(child)
            fault = fault_of(run, step)
            yield f"after kill {trial}: {fault}" if fault else f"the saver ended with {code}" if code != -9 else None
            found, _ = newest(run)
            step = number(found) if found else 0


# What is in the run before the save that is cut: nothing; the two newest and the best, so that one of those is pruned
# and the best stays; a damaged checkpoint of the very step.
Before = Callable[[Path], int]


def nothing_before(run: Path) -> int:
    return 1


def four_before(run: Path) -> int:
    for step in (1, 2, 3, 4):
        save(run, step)
    return 5


def damaged_before(run: Path) -> int:
    for step in (1, 2, 3):
        save(run, step)
    (step_folder(run, 3) / "state.json").write_text("{}")
    return 3


SITUATIONS: tuple[Before, ...] = (nothing_before, four_before, damaged_before)
KILL, ERROR = "killed", "an error"


def save_with_fault(run: Path, step: int, at: int | None, how: str, variant: str, said: Connection) -> None:
    """Saves once in a child, with a fault at moment `at`, and says how many moments there were, or what was raised."""

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "injected")

    with broken(variant):
        moments = Moments(changing_calls, at, kill_self if how == KILL else fail)
        try:
            with moments:
                save(run, step)
        except (StorageError, OSError) as error:
            said.send(f"{type(error).__name__}: {error}")
        else:
            said.send(moments.seen)


def saved_with_fault(run: Path, step: int, at: int | None, how: str, variant: str) -> tuple[Any, int | None]:
    """Returns what such a child said, or None if it said nothing, and its exit code."""
    listener, said = FORKS.Pipe(duplex=False)
    child = start(save_with_fault, run, step, at, how, variant, said)
    said.close()
    try:
        word = listener.recv()
    except EOFError:
        word = None
    return word, exit_code(child)


def faults(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Kills the process, or raises an error of the disk, before and after every call that changes the disk.

    There are at most `count` trials, which are then a choice of those calls.
    """
    chance = random.Random(seed)
    places: list[tuple[Before, int, str]] = []
    for before in SITUATIONS:
        with tempfile.TemporaryDirectory() as folder:
            moments, code = saved_with_fault(Path(folder), before(Path(folder)), None, KILL, variant)
            if code != 0 or not isinstance(moments, int):
                yield f"a save without a fault ended with {code}: {moments}"
                return
            places += [(before, moment, how) for moment in range(moments) for how in (KILL, ERROR)]
    for before, moment, how in chance.sample(places, min(count, len(places))):
        with tempfile.TemporaryDirectory() as folder:
            fault = fault_at(Path(folder), before, moment, how, variant)
            yield fault and f"{how} at moment {moment}, {before.__name__.replace('_', ' ')}: {fault}"


def fault_at(run: Path, before: Before, moment: int, how: str, variant: str) -> str | None:
    step = before(run)
    word, code = saved_with_fault(run, step, moment, how, variant)
    if code != (-signal.SIGKILL if how == KILL else 0):
        return f"the saver ended with {code}"
    if isinstance(word, str) and not (word.startswith("StorageError") and "disk is full" in word and "\n" not in word):
        return f"it said {word!r}"
    # An error that clean-up may pass over leaves the checkpoint published.
    published = step if isinstance(word, int) else step - 1
    spoilt = step if before is damaged_before else None
    if fault := fault_of(run, published, spoilt):
        return fault
    save(run, step + 1)
    left = [entry.name for entry in (run / "checkpoints").iterdir() if not entry.name.startswith("step-")]
    return f"{left} is left after the next save" if left else fault_of(run, step + 1, spoilt)


def power_losses(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Simulates a loss of power after each change of the disk (or `count` of them).

    A file system may then have kept any later change of a name without the content, unless that was synced before. Both
    extremes are computed from the recorded changes.
    """
    chance = random.Random(seed)
    changes: list[tuple[str, str, str]] = []

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        four_before(run)
        with broken(variant), recorded(changes):
            for step in (5, 6):
                save(run, step)
        present = {str(step_folder(run, step)) for step in (2, 3, 4)}
    moments = range(len(changes) + 1)
    for moment in sorted(chance.sample(moments, min(count, len(moments)))):
        yield loss_after(changes[:moment], present, str(step_folder(run, 2)))


@contextlib.contextmanager
def recorded(changes: list[tuple[str, str, str]]) -> Iterator[None]:
    """Appends (what, path, new path) for each fsync and rename of this process, in order."""
    fsync, rename = os.fsync, Path.rename

    def noted_fsync(descriptor: int) -> None:
        changes.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink()), ""))
        fsync(descriptor)

    def noted_rename(path: Path, target: Path) -> Path:
        changes.append(("rename", str(path), str(target)))
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", noted_fsync)
        patch.setattr(Path, "rename", noted_rename)
        yield


FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "tokenizer.json")


def loss_after(changes: list[tuple[str, str, str]], present: set[str], lowest: str) -> str | None:
    """Says what a loss of power after `changes` could have cost.

    `present` are the checkpoints that were durable before, and `lowest` is the one of them that stays the best.
    """
    synced: set[str] = set()  # files and folders whose content is durable, under the name of the moment
    certain, possible = set(present), set(present)  # checkpoints that are there, and that may be
    removed: set[str] = set()  # names whose removal may have happened
    waiting: list[tuple[str, str]] = []  # renames that are not yet durable
    for what, path, target in changes:
        if what == "fsync":
            synced.add(path)
            for old, new in [pair for pair in waiting if str(Path(pair[0]).parent) == path]:
                waiting.remove((old, new))
                certain.discard(old)
                possible.discard(old)
                removed.discard(old)
                if Path(new).name.startswith("step-"):
                    certain.add(new)
        elif what == "rename":
            waiting.append((path, target))
            if Path(target).name.startswith("step-"):
                wanted = {str(Path(path, name)) for name in (*FILES, "manifest.json")} | {path}
                if missing := sorted(wanted - synced):
                    return f"{target} may be there without the content of {missing[0]}"
                possible.add(target)
            else:
                removed.add(path)
    surely_left = certain - removed
    if not surely_left:
        return "no checkpoint is sure to be left"
    newest_certain = max(certain)
    if newest_certain not in surely_left:
        return f"{newest_certain}, the newest, may be gone"
    if lowest not in surely_left:
        return f"{lowest}, the best, may be gone"
    return None


def full_disks(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Fills the disk at some byte of any file of a checkpoint."""
    chance = random.Random(seed)
    for _ in range(count):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            step = four_before(run)
            files = sorted(step_folder(run, step - 1).iterdir())
            file = chance.choice(files)
            offset = chance.randrange(file.stat().st_size)
            listener, said = FORKS.Pipe(duplex=False)
            child = start(save_on_full_disk, run, step, file.name, offset, variant, said)
            said.close()
            try:
                word = listener.recv()
            except EOFError:
                word = None
            code = exit_code(child)
            fault = fault_of(run, step - 1)
            shown = [entry.name for entry in (run / "checkpoints").iterdir()]
            if code != 0 or not isinstance(word, str):
                fault = f"the saver ended with {code} and said {word!r}"
            elif not word.startswith("StorageError") or "what was saved earlier is whole" not in word or "\n" in word:
                fault = f"it said {word!r}"
            elif sorted(shown) != [f"step-{kept:08}" for kept in (2, 3, 4)]:
                fault = f"{sorted(shown)} is in sight"
            yield fault and f"full at byte {offset} of {file.name}: {fault}"


def save_on_full_disk(run: Path, step: int, name: str, offset: int, variant: str, said: Connection) -> None:
    """Saves in a child. Once the file `name` is opened, no file may grow beyond `offset` bytes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def limit(frame: Any, event: str, arg: Any) -> bool:
        if event == "c_call" and arg.__name__ in ("open", "serialize_file"):
            # safetensors is given the name as the second argument, which the frame of `save_file` has.
            path = frame.f_locals.get("filename", frame.f_locals.get("self", ""))
            now = offset if Path(str(path)).name == name else hard
            resource.setrlimit(resource.RLIMIT_FSIZE, (now, hard))
        return False

    with broken(variant):
        try:
            with Moments(limit):
                save(run, step)
        except (StorageError, OSError) as error:
            said.send(f"{type(error).__name__}: {error}")
        else:
            said.send(None)
