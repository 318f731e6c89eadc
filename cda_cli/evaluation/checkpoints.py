"""Evaluates one or several checkpoints on the same text, in the same windows, as `cda eval` does."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from cda_cli.data import Batch, Windows, count_words
from cda_cli.errors import ConfigError
from cda_cli.evaluation.comparison import Comparison
from cda_cli.evaluation.details import Calibration, Detail, LossByPosition
from cda_cli.evaluation.intervals import (
    FEWEST_DOCUMENTS,
    LEVEL,
    RESAMPLES,
    SEED,
    Units,
    stretches_as_units,
    windows_as_units,
)
from cda_cli.evaluation.losses_file import CHECKPOINT, CheckpointLines, LossesFile
from cda_cli.evaluation.sums import AS_IT_IS, Sums, Way, joined, measure
from cda_cli.restore import Restored, Saved, TextSide, open_saved
from cda_cli.signals import StopRequest
from cda_cli.storage import STATE_FILE, recorded_sha256

INTERRUPTED = "interrupted; nothing was written"


@dataclass(frozen=True)
class Plan:
    """How a text is cut into windows (see `cda_cli.data.windows`), and how much of it is evaluated.

    `context` is None for that of the checkpoints, and `stride` is None for disjoint windows.
    """

    context: int | None = None
    stride: int | None = None
    per_document: bool = False
    batch_size: int = 16
    max_batches: int | None = None
    max_documents: int | None = None
    by_position: bool = False
    calibration: bool = False

    def __post_init__(self) -> None:
        if self.per_document and self.max_batches is not None:
            raise ConfigError("--max-batches would end within a document; give --max-documents with --per-document")
        if self.max_documents is not None and not self.per_document:
            raise ConfigError("--max-documents counts documents; give --per-document with it, or --max-batches")

    def details(self, trained: int) -> list[Detail]:
        """What is summed besides the losses, for a model that was trained with a context of `trained` tokens."""
        positions = [LossByPosition(self.context or trained, trained)] if self.by_position else []
        return [*positions, *([Calibration()] if self.calibration else [])]

    def windows(self, text: TextSide) -> Windows:
        """The windows of `text`. Raises ConfigError for a stride that would leave tokens out, and DataError."""
        context = self.context or text.seq_len
        if text.has_answers and (self.context or self.stride or self.per_document):
            raise ConfigError("a task has an example in each window; leave --context, --stride and --per-document out")
        if self.stride is not None and self.stride > context:
            raise ConfigError(
                f"--stride {self.stride} would leave tokens out, as a window has {context}; give {context} or less"
            )
        most = None if self.max_batches is None else self.max_batches * self.batch_size
        windows = text.windows(context, self.stride, self.per_document, most)
        return windows if self.max_documents is None else windows.take(windows.document < self.max_documents)


class Reading(NamedTuple):
    """A checkpoint, and the windows in which its model reads the text."""

    saved: Saved
    text: TextSide
    windows: Windows

    def details(self, plan: Plan) -> list[Detail]:
        return plan.details(self.saved.config.model.seq_len)

    @property
    def documents(self) -> int:
        return int(self.windows.document[-1]) + 1


def open_readings(
    paths: Sequence[Path], plan: Plan, open_text: Callable[[Saved], TextSide], *, best: bool = False
) -> list[Reading]:
    """Opens the text for each of the checkpoints at `paths`: with the settings of the first one's data, in the tokens
    of each.

    Raises ConfigError where their windows or documents would not be the same, and what `open_saved` and `open_text`
    raise.
    """
    first, *others = (open_saved(path, best=best) for path in paths)
    readings = [_reading(first, open_text(first), plan)]
    for saved in others:
        _check_comparable(first, saved, plan)
        text = readings[0].text
        if saved.tokenizer.fingerprint != first.tokenizer.fingerprint:
            config = saved.config.model_copy(update={"data": first.config.data})
            text = open_text(saved._replace(config=config))
        readings.append(_reading(saved, text, plan))
        if readings[-1].documents != readings[0].documents:
            raise ConfigError(
                f"the tokenizer of {saved.path} has no token for some documents that that of {first.path} has; "
                "evaluate them apart"
            )
    return readings


def _reading(saved: Saved, text: TextSide, plan: Plan) -> Reading:
    return Reading(saved, text, plan.windows(text))


def _check_comparable(first: Saved, other: Saved, plan: Plan) -> None:
    if other.tokenizer.fingerprint != first.tokenizer.fingerprint and not plan.per_document:
        raise ConfigError(
            f"{first.path} and {other.path} have different tokenizers, so their windows differ; give --per-document to "
            "compare them by document"
        )
    lengths = [saved.config.model.seq_len for saved in (first, other)]
    if plan.context is None and lengths[0] != lengths[1]:
        raise ConfigError(
            f"{first.path} has a context of {lengths[0]} tokens, and {other.path} one of {lengths[1]}; give both "
            f"--context {min(lengths)}"
        )


def observations(readings: Sequence[Reading], plan: Plan) -> list[Units]:
    """Chooses what the errors and the bootstrap take as one observation, for the windows of each reading.

    That is a document, or where there are few of them a group of windows whose targets fill a context. Of a single
    document that unlike tokenizers read in windows of their own, it is a stretch of the text.
    """
    has_same_windows = len({reading.saved.tokenizer.fingerprint for reading in readings}) == 1
    if not has_same_windows and readings[0].documents == 1:
        return stretches_as_units([torch.from_numpy(reading.windows.target_bytes()) for reading in readings])
    if plan.per_document and (readings[0].documents >= FEWEST_DOCUMENTS or not has_same_windows):
        return [Units(torch.from_numpy(reading.windows.document), "documents") for reading in readings]
    context = plan.context or readings[0].text.seq_len
    return [windows_as_units(len(readings[0].windows), math.ceil(context / (plan.stride or context)))] * len(readings)


# Makes further ways to measure a model, by their names. It gets the model, the dtype of its matrix products, what opens
# the batches once more, and what takes the number of windows that are done.
FurtherWays = Callable[[Restored, torch.dtype, Callable[[], Iterator[Batch]], Callable[[int], None]], Mapping[str, Way]]


def evaluate_readings(
    plan: Plan,
    readings: Sequence[Reading],
    restore: Callable[[Path], tuple[Restored, torch.dtype]],
    stop: StopRequest,
    advance: Callable[[int], None],
    losses: LossesFile | None = None,
    further: FurtherWays = lambda *_: {},
) -> TextEvaluation:
    """Measures each checkpoint as it is and in its `further` ways, one checkpoint after another.

    `restore` gives the model of a checkpoint and the dtype of its matrix products. `advance` gets numbers of windows.
    What `losses` has is not measured again, and the rest is written to it. Raises InterruptedRunError once a stop was
    asked for.
    """
    interrupted = f"interrupted; the same command goes on from {losses.path}" if losses else INTERRUPTED
    sums: list[list[Sums]] = []
    for number, reading in enumerate(readings):
        model = restore(reading.saved.path)
        ways = further(*model, partial(_batches, plan, reading, stop), advance)
        stop.check(interrupted)
        measured = partial(_measured, plan, reading, ways.values(), *model, stop, interrupted, advance)
        if losses is None:
            sums.append(joined(measured()))
        else:
            settings = _settings(plan, reading, list(ways), *model)
            by_document = reading.text.tokenizer if plan.per_document else None
            lines = CheckpointLines(losses, number, settings, reading.windows, list(ways), by_document)
            sums.append(joined(_resumed(lines, measured(lines.done))))
        stop.check(interrupted)
        del model, ways, measured  # so that the next model finds the memory free
    units = observations(readings, plan)
    comparison = Comparison([as_it_is for as_it_is, *_ in sums], units)
    words = [int(count_words(reading.windows, reading.text.tokenizer).sum()) for reading in readings]
    return TextEvaluation(plan, readings, comparison, sums, units, words)


def _batches(plan: Plan, reading: Reading, stop: StopRequest, skipped: int = 0) -> Iterator[Batch]:
    return stop.until(reading.windows.batches(plan.batch_size, skipped))


def _measured(
    plan: Plan,
    reading: Reading,
    further: Collection[Way],
    restored: Restored,
    dtype: torch.dtype,
    stop: StopRequest,
    interrupted: str,
    advance: Callable[[int], None],
    done: int = 0,
) -> Iterator[list[Sums]]:
    """Yields the sums of each batch as the model is and in each `further` way. The first `done` windows are left out.

    Batches have the same windows as without `done`, so that the figures are the same to the bit.
    """
    ways: list[Way] = [AS_IT_IS, *(partial(_unless_stopped, stop, interrupted, way) for way in further)]
    slices = reading.windows.slices(plan.batch_size)
    skipped = sum(each.stop <= done for each in slices)
    within = done - slices[skipped].start if skipped < len(slices) else 0
    advance((done - within) * len(ways))
    batches = _batches(plan, reading, stop, skipped)
    measured = measure(restored.model, batches, restored.device, dtype, ways, advance, reading.details(plan))
    for place, sums in enumerate(measured):
        yield sums if place else [way.take(slice(within, None)) for way in sums]


@contextmanager
def _unless_stopped(stop: StopRequest, interrupted: str, way: Way) -> Iterator[nn.Module | None]:
    """Measures in `way`, unless a stop was asked for: a batch that has many ways takes long."""
    stop.check(interrupted)
    with way() as other:
        yield other


def _resumed(lines: CheckpointLines, measured: Iterator[list[Sums]]) -> Iterator[list[Sums]]:
    """Yields the sums that `lines` had, and those of `measured`, which it adds to `lines`."""
    if lines.sums:
        yield lines.sums
    for sums in measured:
        lines.add(sums)
        yield sums


def _settings(
    plan: Plan, reading: Reading, further: Sequence[str], restored: Restored, dtype: torch.dtype
) -> dict[str, Any]:
    """What the losses of a checkpoint depend on."""
    files = recorded_sha256(reading.saved.path)
    return {
        CHECKPOINT: str(reading.saved.path),
        "weights": files[restored.weights_file],
        "state": files[STATE_FILE],
        "text": [side.digest or blake2b(side.ids.tobytes(), digest_size=16).hexdigest() for side in reading.text.sides],
        "context": plan.context or reading.text.seq_len,
        "stride": plan.stride or plan.context or reading.text.seq_len,
        "per_document": plan.per_document,
        "windows": len(reading.windows),
        "dtype": str(dtype).removeprefix("torch."),
        "interventions": further,
        "by_position": plan.by_position,
        "calibration": plan.calibration,
    }


@dataclass(frozen=True)
class TextEvaluation:
    """What was measured of checkpoints on a text. `comparison` has each as it is.

    `sums` has, for each checkpoint, its sums as it is and in its further ways, and `units` which of its windows are an
    observation.
    """

    plan: Plan
    readings: Sequence[Reading]
    comparison: Comparison
    sums: Sequence[Sequence[Sums]]
    units: Sequence[Units]
    words: Sequence[int]

    @property
    def context(self) -> int:
        return self.plan.context or self.readings[0].text.seq_len

    @property
    def stride(self) -> int:
        return self.plan.stride or self.context

    @property
    def counted(self) -> str:
        """Which tokens were predicted, in words."""
        if self.readings[0].text.has_answers:
            return "each token of the answers"
        if not self.plan.per_document:
            return "each token but the first of a split, separators included"
        mark = "the separator" if self.readings[0].text.tokenizer.bos is None else "the token that begins a document"
        return f"each token of a document, the first of them after {mark}; the separator at its end is not"

    def bits_per_word(self, number: int) -> float:
        """All nats of a checkpoint in bits, over the words of the text; infinite where there is no word."""
        nats = self.comparison.ways[number].nats.sum().item()
        return nats / math.log(2) / self.words[number] if self.words[number] else math.inf

    def details(self, number: int) -> dict[str, Any]:
        """What was asked for besides the losses, of a checkpoint as it is, by its name."""
        details = self.readings[number].details(self.plan)
        columns = self.comparison.ways[number].details
        parts = columns.split([detail.width for detail in details], 1) if details else ()
        return {detail.name: detail.summary(part) for detail, part in zip(details, parts, strict=True)}

    def as_dict(self, further: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """The document of `--json`: one object for a checkpoint, or a list of such objects for several.

        `further` are the figures of its further ways, for each checkpoint.
        """
        text, units = self.readings[0].text, self.comparison.units
        shared = {
            "data": text.description,
            "split": text.split,
            "context": self.context,
            "stride": self.stride,
            "per_document": self.plan.per_document,
            "counted": self.counted,
            "resampled": {
                "unit": units.resampled, "number": units.blocks, "resamples": RESAMPLES, "seed": SEED, "level": LEVEL,
            },
        }  # fmt: skip
        found = [self._checkpoint(number) for number in range(len(self.readings))]
        for checkpoint, figures in zip(found, further, strict=False):
            checkpoint |= figures
        return {**found[0], **shared} if len(found) == 1 else {**shared, "checkpoints": found}

    def _checkpoint(self, number: int) -> dict[str, Any]:
        reading, evaluation = self.readings[number], self.comparison.evaluation(number)
        found: dict[str, Any] = {
            "checkpoint": str(reading.saved.path),
            **evaluation._asdict(),
            "loss_interval": self.comparison.loss(number)[2:],
            "bits_per_byte_interval": self.comparison.bits_per_byte(number)[2:],
            "bits_per_token": evaluation.loss / math.log(2),
            "bits_per_word": self.bits_per_word(number),
            "words": self.words[number],
        }
        if self.plan.per_document:
            found["documents"] = reading.documents
        found |= self.details(number)
        if number:
            found |= self.comparison.difference(number).as_dict("difference")
        return found
