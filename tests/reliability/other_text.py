"""A run goes on with the text that it was trained on, wherever that lies, and with no other."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cda_cli.config import Config
from cda_cli.data import prepare
from cda_cli.errors import CdaError
from tests.commands.helpers import contents
from tests.reliability import micro
from tests.reliability.variants import broken
from tests.training.helpers import changed, trained

STEPS = 4


def texts(count: int, seed: int, variant: str = "") -> Iterator[str | None]:
    """Changes a mapped or a streamed text: a letter, the file with its size and time kept, or only its place and time.

    The first two changes are refused, and change nothing; after the last the run goes on.
    """
    chance = random.Random(seed)
    for number in range(count):
        with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch, broken(variant):
            folder = Path(name)
            patch.setenv("CDA_CACHE", str(folder / "cache"))
            streaming = bool(number % 2)
            text = micro.streamed_text(folder) if streaming else micro.mapped_text(folder)
            config = changed(micro.settings(text, streaming=streaming), steps=STEPS)
            trained(config, folder / "run")
            what = chance.choice((_one_letter, _replaced, _moved))
            fault = what(text, changed(config, steps=STEPS + 1), folder / "run", chance)
            yield fault and f"{text.name}, {what.__name__.strip('_').replace('_', ' ')}: {fault}"


def _one_letter(text: Path, config: Config, run: Path, chance: random.Random) -> str | None:
    _change_a_letter(text, chance)
    return _is_refused(config, run) or _is_prepared_anew(text, config)


def _replaced(text: Path, config: Config, run: Path, chance: random.Random) -> str | None:
    before = text.stat()
    _change_a_letter(text, chance)
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    return _is_refused(config, run) or _is_prepared_anew(text, config)


def _moved(text: Path, config: Config, run: Path, chance: random.Random) -> str | None:
    moved = text.with_name(f"moved-{chance.randrange(1000)}{text.suffix}")
    text.rename(moved)
    os.utime(moved)
    elsewhere = config.model_copy(update={"data": config.data.model_copy(update={"source": str(moved)})})
    try:
        trained(elsewhere, run)
    except CdaError as error:
        return f"the same text elsewhere is refused: {error}"
    return None


def _change_a_letter(text: Path, chance: random.Random) -> None:
    """Changes a letter of a value, so that JSON stays JSON."""
    letters = text.read_bytes()
    places = [place for place, byte in enumerate(letters) if byte in b"aeiou" and letters[place - 1] not in b'"\\{']
    place = chance.choice([place for place in places if not letters[:place].endswith((b'{"t', b"\\u00"))])
    text.write_bytes(letters[:place] + b"z" + letters[place + 1 :])


def _is_refused(config: Config, run: Path) -> str | None:
    before = contents(run)
    try:
        trained(config, run)
    except CdaError:
        return None if contents(run) == before else "it is refused, but the run's folder has changed"
    return "the run goes on with another text"


def _is_prepared_anew(text: Path, config: Config) -> str | None:
    if config.data.streaming:
        return None
    corpus = prepare(config.data, show_progress=False)
    tokens = b"".join(
        side.ids[side.ids != corpus.tokenizer.separator].tobytes() for side in (corpus.train, corpus.validation)
    )
    return None if tokens == text.read_bytes() else "the tokens are those of the text before"
