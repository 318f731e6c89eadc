"""A damaged file of a checkpoint is never taken for an intact one, and the error is one sentence."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from cda_cli.errors import CdaError
from cda_cli.storage import load, locate, newest, open_checkpoint
from tests.commands.helpers import run_cda
from tests.reliability import micro, sharded
from tests.reliability.harness import become_cda, exit_code, start
from tests.reliability.variants import broken

COMMAND_EVERY = 50  # of that many trials, one goes through a command


def flipped(data: bytes, other: bytes, chance: random.Random) -> bytes:
    bits = int.from_bytes(data, "little")
    for _ in range(chance.choice([1, 1, 1, 8])):
        bits ^= 1 << chance.randrange(8 * len(data))
    return bits.to_bytes(len(data), "little")


def cut(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def longer(data: bytes, other: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randrange(1, 64))


def zeroed(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Zeroes a block, as if it was never written before a crash."""
    start = chance.randrange(len(data))
    size = min(chance.choice([1, 64, 512, 4096]), len(data) - start)
    return data[:start] + bytes(size) + data[start + size :]


def moved(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Swaps two parts."""
    place = chance.randrange(1, len(data))
    return data[place:] + data[:place]


def random_bytes(data: bytes, other: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    size = min(chance.randrange(1, 256), len(data) - start)
    return data[:start] + chance.randbytes(size) + data[start + size :]


def of_another_checkpoint(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Takes the intact file of another step."""
    return other


def spelt_otherwise(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """Writes the same JSON in another way, or adds a space to a file that is not JSON."""
    try:
        return json.dumps(json.loads(data), indent=chance.choice([None, 1])).encode()
    except ValueError:
        return data + b" "


KINDS: tuple[Callable[[bytes, bytes, random.Random], bytes], ...] = (
    flipped, flipped, cut, longer, zeroed, moved, random_bytes, of_another_checkpoint, spelt_otherwise,
)  # fmt: skip


def damaged_files(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Damages every file of a real run's checkpoint, the manifest too, in all kinds of ways."""
    yield from damaged(finished_run, COMMAND_EVERY, count, seed, variant)


def damaged_shards(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """The same for a checkpoint that several processes have saved."""
    yield from damaged(sharded.finished_run, None, count, seed, variant)


def damaged(
    make_run: Callable[[Path], Path], command_every: int | None, count: int, seed: int, variant: str
) -> Iterator[str | None]:
    """Damages the newest checkpoint of a run, file by file. Of `command_every` trials one goes through a command."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))
        path, earlier = locate(run), sorted((run / "checkpoints").iterdir())[0]
        names = sorted(file.name for file in path.iterdir())
        with broken(variant):
            for trial in range(count):
                file, kind = path / names[trial % len(names)], chance.choice(KINDS)
                whole = file.read_bytes()
                changed = kind(whole, (earlier / file.name).read_bytes(), chance)
                while changed == whole:
                    changed = flipped(whole, whole, chance)
                file.write_bytes(changed)
                by_command = command_every is not None and trial % command_every == command_every - 1
                fault = accepted_by_command(path) if by_command else accepted(run, path)
                yield fault and f"{file.name}, {kind.__name__.replace('_', ' ')} in trial {trial}: {fault}"
                file.write_bytes(whole)


def finished_run(folder: Path) -> Path:
    """Makes a micro run with two checkpoints and a tokenizer.json."""
    tokenizer = micro.write_tokenizer(folder / "tokenizer.json")
    config = micro.settings(micro.mapped_text(folder))
    config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(tokenizer)})})
    arguments = ["train", "--config", micro.write_settings(folder / "micro.yaml", config), "--out", folder / "run"]
    code = exit_code(start(become_cda, [*arguments, "--steps", 8], folder / "cache", folder / "said"))
    assert code == 0, (folder / "said").read_text()
    return folder / "run"


def accepted(run: Path, path: Path) -> str | None:
    """Says what is wrong with the commands that read a damaged checkpoint `path`, the newest of `run`."""
    found, passed_over = newest(run)
    if found == path:
        return "it was taken for whole"
    if found is None or len(passed_over) != 1 or str(path) not in passed_over[0]:
        return f"{found} was taken, and of the damaged one it was said {passed_over}"
    for read in (load, read_by_parts):
        try:
            read(path)
        except CdaError as error:
            if ";" not in str(error) or "\n" in str(error):
                return f"no sentence with a remedy: {error}"
        else:
            return "it was loaded"
    return None


def read_by_parts(path: Path) -> None:
    """Reads a checkpoint as several processes do, which check a file only when they read some of it."""
    opened = open_checkpoint(path)
    for part in (opened.model, opened.optimizer, opened.ema):
        for tensor in part.values():
            tensor.read()


def accepted_by_command(path: Path) -> str | None:
    result = run_cda("train", "--resume", path, "--out", path.parents[2] / "branch")
    if result.code == 2 and result.err.startswith("error: ") and result.err.count("\n") == 1:
        return None
    return f"`cda train --resume` ended with {result.code} and said {result.err!r}"
