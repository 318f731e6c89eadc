"""Whether runs are comparable: what is the same, what is not, and what follows from it for who reads their losses."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from cda_cli.comparison.recorded import RecordedRun, have_one_tokenizer

LETTERS = "ABCDEF"  # what the runs are called, in their order
TOKENS_OF_DATA = ("tokenizer", "bos", "eos")  # settings of data that choose the tokens, and not the text


class Fact(NamedTuple):
    """Whether something is the same that must be for losses to compare; `is_same` is None if no record says so."""

    is_same: bool | None
    sentence: str


def facts(runs: Sequence[RecordedRun]) -> dict[str, Fact]:
    """The facts of `runs`, by what they are about."""
    machine = Fact(None, "not recorded; speed, time and memory compare on one machine that did nothing else")
    of_one_value = {name: fact.of(runs) for name, fact in FACTS.items()}
    return {"data": _data(runs), "tokenizer": _tokenizer(runs), **of_one_value, "machine": machine}


def seed_groups(runs: Sequence[RecordedRun]) -> list[str]:
    """The letters of the runs that differ in their seeds alone.

    Their settings of model, data and optimizer are the same, and so are their precision, their text, the weights that
    they began from, and the step that they came to.
    """
    groups: dict[str, dict[int, str]] = {}
    for letter, run in zip(LETTERS, runs, strict=False):
        config = run.config
        settings = (config.model, config.data, config.optim, config.run.dtype)
        alike = repr((settings, run.text, run.began_from, run.summary.step))
        groups.setdefault(alike, {}).setdefault(config.run.seed, letter)
    return ["".join(by_seed.values()) for by_seed in groups.values() if len(by_seed) > 1]


def _data(runs: Sequence[RecordedRun]) -> Fact:
    if all(run.text for run in runs) and have_one_tokenizer(runs):
        if all(run.text == runs[0].text for run in runs):
            return Fact(True, "the checkpoints have the same training and validation text, by its digest")
    elif _same(runs, lambda run: repr(run.config.data.model_dump(exclude=set(TOKENS_OF_DATA)))):
        return Fact(True, "the settings name the same text; that its content was the same is not recorded")
    return Fact(False, "they trained on different text, so a difference may be that of the text")


def _tokenizer(runs: Sequence[RecordedRun]) -> Fact:
    if have_one_tokenizer(runs):
        return Fact(True, "losses for each token compare, and so do bits per byte")
    name = attrgetter("config.data.tokenizer")  # A task has its own tokens, and bpe:N those of its text.
    names = "" if _same(runs, name) else f"{_values(runs, name)}; "
    return Fact(False, f"{names}only bits per byte compare, and equal tokens are unequal text")


class _OfOneValue(NamedTuple):
    """A fact about one value of each run, None where it is not recorded.

    `same` and `other` say what follows; {} stands for the values.
    """

    value: Callable[[RecordedRun], Hashable]
    same: str
    other: str
    written: Callable[[Any], str] = str

    def of(self, runs: Sequence[RecordedRun]) -> Fact:
        is_same = _same(runs, self.value)
        words = self.written(self.value(runs[0])) if is_same else _values(runs, self.value, self.written)
        sentence = (self.same if is_same else self.other).format(words)
        return Fact(None if any(self.value(run) is None for run in runs) else is_same, sentence)


def _tokens_seen(run: RecordedRun) -> int | None:
    return int(run.training[-1].tokens) if run.training else None


def _ending(run: RecordedRun) -> str:
    return f"{run.summary.state} at step {run.summary.step:,} of {run.summary.steps:,}"


FACTS = {
    "tokens": _OfOneValue(
        _tokens_seen,
        "{}",
        "{}; read the losses at equal tokens, not those of the ends",
        lambda tokens: "not recorded" if tokens is None else f"{tokens:,}",
    ),
    "seed": _OfOneValue(
        lambda run: run.config.run.seed,
        "{}; how far another seed would move each loss is not known from these runs",
        "{}; a part of each difference is that of the seeds",
    ),
    "state": _OfOneValue(
        lambda run: run.summary.state if run.summary.state == "finished" else _ending(run),
        "{}",
        "{}; a run that has not finished would still fall",
    ),
    "schedule": _OfOneValue(
        lambda run: (run.config.optim.schedule, round(run.scheduled_tokens)),
        "{}",
        "{}; at equal tokens one is later in its schedule, which alone lowers its loss",
        lambda value: f"{value[0]} over {value[1]:,} tokens",
    ),
    "context": _OfOneValue(
        lambda run: run.config.model.seq_len,
        "{} tokens",
        "{} tokens; on the same text the models are evaluated with the smallest of them",
    ),
    "validation": _OfOneValue(
        lambda run: run.validated,
        "{}",
        "{}; the losses in training are of unequal parts of the text",
        lambda amount: f"{amount} each time" if amount else "none",
    ),
    "weights": _OfOneValue(
        lambda run: run.began_from or "random weights",
        "all began from {}",
        "{}; a run that begins from trained weights has seen more than its own tokens",
    ),
}


def _same(runs: Sequence[RecordedRun], value: Callable[[RecordedRun], Hashable]) -> bool:
    return len({value(run) for run in runs}) == 1


def _values(
    runs: Sequence[RecordedRun], value: Callable[[RecordedRun], Hashable], written: Callable[[Any], str] = str
) -> str:
    """Such as "A 1, B 2"."""
    return ", ".join(f"{letter} {written(value(run))}" for letter, run in zip(LETTERS, runs, strict=False))
