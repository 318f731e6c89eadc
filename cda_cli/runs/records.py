"""The records of a run: one type for each kind of line in metrics.jsonl. docs/metrics.md is written from these types.

A record is one JSON object with `step` and `kind` first. A number that is not finite is null there. A field with a
default is left out while it has that default.

To add a field or a kind, give a new field a default, so that older files still read, and raise VERSION. A name keeps
its meaning and its unit for good: readers ignore the names that they do not know, and trust those that they know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from types import NoneType
from typing import Annotated, Any, ClassVar, NamedTuple, get_args, get_origin, get_type_hints

VERSION = 5  # of the schema; files that name none have the first


class About(NamedTuple):
    """What the docs say of a field; `unit` is empty where it has none."""

    unit: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all kinds of records have."""

    kind: ClassVar[str]

    step: Annotated[int, About("steps", "Optimizer steps that the run had done.")]


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """What one layer selects: means over its heads and over the first sequence of the step, or 8,192 tokens of it.

    Of more than 1,024 tokens, about 1,024 queries are looked at, evenly apart.
    """

    layer: Annotated[int, About("", "Number of the layer, from 0.")]
    sparsity_k: Annotated[float, About("keys", "Budget k of a row of attention.")]
    effective_support: Annotated[float, About("keys", "exp of the entropy of λ/Σλ: how many keys share a row.")]
    capped_share: Annotated[
        float, About("share of k", "Keys with λ ≥ 1 − 1e-6 for each unit of k, over rows that see more than k keys.")
    ]
    distance_back: Annotated[float, About("tokens", "Distance from a query back to its keys, weighted by λ/Σλ.")]
    active_units: Annotated[float, About("share", "Hidden units of the feed-forward with |activation| > 1e-3.")]
    active_blocks: Annotated[float | None, About("blocks", "Blocks of units that a router chose for a token.")] = None


@dataclass(frozen=True, kw_only=True)
class HeadAlarm:
    """A head that has stopped to select, by the means over the first sequence of the step (training.md)."""

    layer: Annotated[int, About("", "Number of the layer, from 0.")]
    head: Annotated[int, About("", "Number of the head in its layer, from 0.")]
    state: Annotated[
        str,
        About("", "`collapsed`: on as few keys as k allows; `sink`: on the first key; `spread`: on all keys alike."),
    ]


@dataclass(frozen=True, kw_only=True)
class TrainRecord(Record):
    """A training step: every `run.log_every` steps, after the last step, and before a stop that was asked for."""

    kind: ClassVar[str] = "train"

    loss: Annotated[float, About("nats per token", "Mean over the steps since the last record of this kind.")]
    bits_per_byte: Annotated[
        float, About("bits per byte", "All nats of those steps, in bits, over the bytes of text of their targets.")
    ]
    lr: Annotated[float, About("", "Learning rate of this step.")]
    eps: Annotated[
        float, About("", "Temperature ε of the attention in this step, without the factors of `model.learned_eps`.")
    ]
    grad_norm: Annotated[float, About("", "Euclidean norm of the gradient of this step, before clipping.")]
    ff_l1: Annotated[
        float | None, About("", "Mean over layers and tokens of Σ|h| of the feed-forward (`optim.ff_l1`).")
    ] = None
    support: Annotated[
        float | None,
        About("keys", "Effective support, mean over a sample of the rows of all heads (`optim.support_target`)."),
    ] = None
    support_multiplier: Annotated[
        float | None, About("nats per token", "Multiplier of the constraint on the support in this step.")
    ] = None
    tokens: Annotated[int, About("tokens", "Tokens trained on since the run began.")]
    tokens_per_second: Annotated[
        float,
        About("tokens per second", "Speed of all processes over 20 train records, without pauses to validate or save."),
    ]
    seconds_left: Annotated[
        float | None,
        About("seconds", "Time for the remaining steps at the pace of the last ones; null before a step was measured."),
    ]
    data_wait: Annotated[float, About("share", "Part of the training time in which the next batch was not there yet.")]
    mfu_computed: Annotated[
        float | None, About("share", "Model FLOPs utilisation by the products that the code makes.")
    ] = None
    mfu_dense: Annotated[float | None, About("share", "Model FLOPs utilisation by 6N + 12LdT a token.")] = None
    memory_bytes: Annotated[
        int, About("bytes", "Peak so far: what PyTorch held on a GPU, or else what the process had resident.")
    ]
    layers: Annotated[tuple[LayerRecord, ...], About("", "One object for each layer, see below.")]
    alarms: Annotated[
        tuple[HeadAlarm, ...],
        About("", "One object for each head that has stopped to select, see below; none during the warm-up."),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class RefusedRecord(Record):
    """A step that was refused, for a loss or a gradient that is not finite; it is tried again with the next batch."""

    kind: ClassVar[str] = "refused"

    step: Annotated[int, About("steps", "Number of the step that was refused.")]
    saw: Annotated[str, About("", "Loss and gradient norm of that step, in words.")]
    in_a_row: Annotated[int, About("steps", "Refusals one after another, this one included.")]


@dataclass(frozen=True, kw_only=True)
class ValidationRecord(Record):
    """The validation split: every `run.eval_every` steps, and after the last one, over `run.eval_batches` batches."""

    kind: ClassVar[str] = "validation"

    loss: Annotated[float, About("nats per token", "Mean over all tokens.")]
    standard_error: Annotated[
        float, About("nats per token", "Standard error of the loss over windows; null for a single window.")
    ]
    perplexity: Annotated[float, About("", "exp of the loss.")]
    bits_per_byte: Annotated[
        float, About("bits per byte", "All nats, in bits, over `text_bytes`; null where that is 0.")
    ]
    bits_per_byte_error: Annotated[float, About("bits per byte", "Standard error of `bits_per_byte`.")]
    tokens: Annotated[int, About("tokens", "Tokens that were predicted.")]
    text_bytes: Annotated[
        int | None, About("bytes", "UTF-8 text that these tokens stand for; missing where a version did not count it.")
    ] = None
    windows: Annotated[int, About("windows", "Sequences that hold these tokens.")]
    ema_loss: Annotated[
        float | None, About("nats per token", "`loss` of the averaged weights (`optim.ema_decay`).")
    ] = None
    ema_bits_per_byte: Annotated[float | None, About("bits per byte", "`bits_per_byte` of the averaged weights.")] = (
        None
    )


@dataclass(frozen=True, kw_only=True)
class SampleRecord(Record):
    """A text that the model wrote: every `run.sample_every` steps."""

    kind: ClassVar[str] = "sample"

    text: Annotated[str, About("", "The beginning of the validation split, ▸, and what the model added.")]


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord(Record):
    """A checkpoint was saved."""

    kind: ClassVar[str] = "checkpoint"

    path: Annotated[str, About("", "Its folder, as the command named it: relative to where it ran, or absolute.")]


@dataclass(frozen=True, kw_only=True)
class InitRecord(Record):
    """The weights that the run started from, if it did not start from random ones (`run.init_from`)."""

    kind: ClassVar[str] = "init"

    path: Annotated[str, About("", "Folder of their checkpoint.")]
    from_step: Annotated[int, About("steps", "Step of that checkpoint.")]
    file: Annotated[str, About("", "Name of their file there; that of a moving average is ema.safetensors.")]
    sha256: Annotated[str, About("", "SHA-256 of that file, as the manifest of that checkpoint has it.")]


@dataclass(frozen=True, kw_only=True)
class SchemaRecord(Record):
    """The schema of the lines after it: the first line of a run, and where a run goes on with another version."""

    kind: ClassVar[str] = "schema"

    version: Annotated[int, About("", "Version of the schema. Lines without such a line before them follow version 1.")]


KINDS: dict[str, type[Record]] = {
    each.kind: each
    for each in (TrainRecord, RefusedRecord, ValidationRecord, SampleRecord, CheckpointRecord, InitRecord, SchemaRecord)
}
_TYPES: dict[type[Any], dict[str, Any]] = {
    kind: get_type_hints(kind) for kind in (*KINDS.values(), LayerRecord, HeadAlarm)
}


def to_json(record: Record) -> dict[str, Any]:
    """The object that stands for `record` in metrics.jsonl, with numbers that are not finite as they are."""
    return {"step": record.step, "kind": record.kind} | _written(record)


def _written(record: Any) -> dict[str, Any]:
    """The fields of a record, or of a part of one, that are not at their defaults."""
    found: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if value != field.default:
            found[field.name] = [_written(part) for part in value] if isinstance(value, tuple) else value
    return found


def from_json(values: Mapping[str, Any]) -> Record | None:
    """The record that `values` stands for: `to_json` undone, with NaN for each number that is null or missing.

    It is None for a kind that is not known, and where a field is missing or not of its type. Fields that are not known
    are ignored.
    """
    kind = values.get("kind")
    known = KINDS.get(kind) if isinstance(kind, str) else None
    try:
        return _read(known, values) if known else None
    except (TypeError, OverflowError):
        return None


def numbers(record: Record) -> dict[str, float]:
    """The numbers of a record but its step, under the names that trackers know: KIND/NAME, KIND/layer N/NAME."""
    found: dict[str, float] = {}
    for name, value in to_json(record).items():
        if name == "layers":
            for layer in value:
                place = f"{record.kind}/layer {layer.pop('layer')}"
                found |= {f"{place}/{inner}": number for inner, number in layer.items()}
        elif name != "step" and isinstance(value, (int, float)):
            found[f"{record.kind}/{name}"] = value
    if isinstance(record, TrainRecord):
        found[f"{record.kind}/alarms"] = len(record.alarms)
    return found


def _read(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """Raises TypeError or OverflowError where `values` is no `kind`."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{values!r} is no object")
    present = {
        field.name: _value(_TYPES[kind][field.name], values.get(field.name), optional=field.default is not MISSING)
        for field in fields(kind)
        if field.name in values or field.default is MISSING
    }
    return kind(**present)


def _value(kind: Any, value: Any, optional: bool) -> Any:
    """`value` as a field of type `kind`. Null is NaN in a number, unless null has a meaning of its own there.

    It has one where the type allows None and the field is not `optional`: an optional field would be left out instead.
    """
    if get_origin(kind) is tuple:
        return tuple(_read(get_args(kind)[0], inner) for inner in value)
    kinds = get_args(kind) or (kind,)
    if value is None and NoneType in kinds and not optional:
        return None
    if float in kinds and (value is None or type(value) in (int, float)):
        return math.nan if value is None else float(value)
    if type(value) not in kinds:
        raise TypeError(f"{value!r} is no {kind}")
    return value
