"""Finds the checkpoint that a run goes on from, and checks that it is the same run, on the same text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cda_cli.config import Config, flat
from cda_cli.data import Tokenizer
from cda_cli.errors import CheckpointError, ConfigError
from cda_cli.plurals import counted
from cda_cli.runs.folder import Run, began_from
from cda_cli.settings_table import as_written
from cda_cli.storage import Checkpoint, load, locate


def find_checkpoint(
    run: Run, resume: str, read: Callable[[Path], Checkpoint] = load
) -> tuple[Checkpoint | None, list[str]]:
    """Finds the checkpoint that `run` goes on from, and returns what `read` gives, which takes its path.

    Also returns a sentence for each damaged one passed over.

    `resume` "auto" takes the newest intact checkpoint of `run`, if there is one, and "never" wants a folder without a
    run. Anything else is the path of a run or checkpoint to go on from. If `run` has checkpoints already, that must be
    the newest of them, so that two histories never mix in one folder.

    Raises ConfigError or CheckpointError if there is nothing to go on from, or if something is in the way.
    """
    run.check()
    if resume == "auto":
        path, damaged = run.newest()
        if path is None and run.steps():
            raise CheckpointError(
                f"no checkpoint in {run.path} is whole: {damaged[0]}; copy the run afresh, or start with another --out"
            )
        return (read(path), damaged) if path else (None, [])
    if resume == "never":
        if run.steps():
            raise ConfigError(f"{run.path} holds another run; choose another --out, or go on with --resume auto")
        return None, []
    path = locate(Path(resume))
    if run.steps() and path.resolve() != (run.newest()[0] or run.path).resolve():
        raise ConfigError(f"{run.path} already holds a run that {path} is not the newest of; choose another --out")
    return read(path), []


def check_same_beginning(before: Config, now: Config, checkpoint: Path) -> None:
    """Raises ConfigError if the settings `now` name other weights to start from than the run of `checkpoint` did.

    Its settings are `before`. A run that goes on keeps its own weights, so it need not name any.
    """
    asked = now.run.init_from
    if asked is not None and not began_from(before, asked):
        raise ConfigError(
            f"the run would go on from {checkpoint}, which did not begin from {asked}; choose another --out, or leave "
            "--init-from out"
        )


def check_same_run(before: Config, now: Config, where: Path, *, same_text: bool = False) -> None:
    """Raises ConfigError if the settings `now` make another run than `before`, those of the run in `where`.

    Model, data, seed and optimizer make a run; steps, rates and intervals may change. With the `same_text`, in the same
    tokens, the text may lie in another place.
    """
    check_same_model(before, now, where)
    places = {"source", "tokenizer"} if same_text else set()
    for name, value in before.data.model_dump(exclude=places).items():
        if value != getattr(now.data, name):
            _refuse(where, f"data.{name}", value, getattr(now.data, name))
    if before.run.seed != now.run.seed:
        _refuse(where, "run.seed", before.run.seed, now.run.seed)
    if before.optim.optimizer != now.optim.optimizer:
        _refuse(where, "optim.optimizer", before.optim.optimizer, now.optim.optimizer)


def check_fork(source: Checkpoint, before: Config, now: Config) -> None:
    """Raises ConfigError if a run with the settings `now` cannot go on from `source`, a checkpoint of a run `before`.

    Its data must come in the same order, for the same optimizer; the model may be another.
    """
    if not source.state["optimizer"]:
        raise ConfigError(f"{source.path} is a model that came without an optimizer; leave run.fork out")
    flat_before, flat_now = flat(before), flat(now)
    same = ("model.seq_len", "run.seed", "optim.optimizer", *(key for key in flat_now if key.startswith("data.")))
    for key in same:
        if key not in ("data.source", "data.tokenizer") and flat_before[key] != flat_now[key]:
            raise ConfigError(
                f"a fork goes on with the data and the optimizer of {source.path}, which had {key} "
                f"{as_written(flat_before[key])} and not {as_written(flat_now[key])}; give it the same, or leave "
                "run.fork out"
            )
    if now.optim.steps <= source.state["step"]:
        raise ConfigError(
            f"{source.path} has done {counted(source.state['step'], 'step')}, and the fork is to have "
            f"{now.optim.steps:,} with these; raise --steps"
        )


def check_same_model(before: Config, now: Config, where: Path) -> None:
    """Raises ConfigError if the settings `now` make another model than `before`, those of the run in `where`."""
    for name, value in before.model.model_dump().items():
        if value != getattr(now.model, name):
            _refuse(where, f"model.{name}", value, getattr(now.model, name))


def check_same_tokens(before: Tokenizer, now: Tokenizer, where: Path) -> None:
    """Raises ConfigError if the tokenizer `now` gives other tokens than `before`, that of the model in `where`."""
    if before.fingerprint != now.fingerprint:
        raise ConfigError(
            f"the model in {where} knows the tokens of its own tokenizer and of no other; leave --tokenizer, data.bos "
            "and data.eos as they are there"
        )


def check_same_text(before: Any, now: Mapping[str, Any], text: str, where: Path) -> None:
    """Raises ConfigError if `text` is not what the run in `where` was trained on.

    `now` is the identity of `text` (see `RunData`), and `before` is that of the text of the run, or None if its
    checkpoint has none.
    """
    if before is None or before == now:
        return
    if not isinstance(before, dict):
        raise CheckpointError(
            f"the state.json of the checkpoint in {where} says nothing usable of its data; use an earlier one"
        )
    name = next((name for name, value in now.items() if before.get(name) != value), "kind")
    differs = f"{name}: {before.get(name)} there and {now.get(name)} here"
    if name == "content":
        differs = "as long, with other content"
    elif name == "tokenizer":
        differs = "in the tokens of another tokenizer"
    raise ConfigError(
        f"{text} is not what {where} was trained on ({differs}); put the old text back, name it with --data, or start "
        "a new run with another --out"
    )


def _refuse(where: Path, key: str, before: object, now: object) -> None:
    raise ConfigError(
        f"{where} holds another run ({key} is {before!r} there and {now!r} here); choose another --out, "
        "or give the settings of that run"
    )
