"""Records come back from metrics.jsonl as they were, and older and later files can be read."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cda_cli import strict_json
from cda_cli.runs.records import (
    KINDS,
    About,
    HeadAlarm,
    LayerRecord,
    Record,
    ValidationRecord,
    from_json,
    numbers,
    to_json,
)
from tests.runs.records import LAYER, ONE_OF_EACH, TRAIN, VALIDATION, any_record

# What version 1 wrote, field by field. Old files have these names and these values, so none may ever change.
WRITTEN = {
    "schema": '{"step": 0, "kind": "schema", "version": 1}',
    "train": (
        '{"step": 10, "kind": "train", "loss": 2.5, "bits_per_byte": 3.6067, "lr": 0.001, "eps": 0.1, '
        '"grad_norm": 0.75, "tokens": 5120, "tokens_per_second": 999.9, "seconds_left": 61.0, "data_wait": 0.0123, '
        '"memory_bytes": 536870912, "layers": [{"layer": 0, "sparsity_k": 1.5, "effective_support": 4.25, '
        '"capped_share": 0.125, "distance_back": 7.5, "active_units": 0.75}, {"layer": 1, "sparsity_k": 1.5, '
        '"effective_support": 9.0, "capped_share": 0.125, "distance_back": 7.5, "active_units": 0.75}]}'
    ),
    "refused": '{"step": 11, "kind": "refused", "saw": "loss nan, gradient norm inf", "in_a_row": 2}',
    "validation": (
        '{"step": 10, "kind": "validation", "loss": 2.625, "standard_error": 0.5, "perplexity": 13.804574186067095, '
        '"bits_per_byte": 3.75, "bits_per_byte_error": 0.7, "tokens": 640, "text_bytes": 1600, "windows": 20}'
    ),
    "sample": '{"step": 10, "kind": "sample", "text": "a\u2028b▸c"}',
    "checkpoint": '{"step": 10, "kind": "checkpoint", "path": "runs/x/checkpoints/step-00000010"}',
    "init": (
        '{"step": 0, "kind": "init", "path": "runs/y/checkpoints/step-00000020", "from_step": 20, '
        '"file": "ema.safetensors", "sha256": "00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff00ff"}'
    ),
}


def written(record: Record) -> dict[str, Any]:
    return json.loads(strict_json.dumps(to_json(record)))


@pytest.mark.parametrize("record", ONE_OF_EACH, ids=lambda record: record.kind)
def test_each_kind_has_its_line(record: Record) -> None:
    assert strict_json.dumps(to_json(record)) == WRITTEN[record.kind]
    assert from_json(json.loads(WRITTEN[record.kind])) == record
    assert KINDS.keys() == WRITTEN.keys()


@given(any_record(finite=True))
def test_a_record_comes_back_to_the_last_bit(record: Record) -> None:
    """A rounded loss could not show that a resumed run is the same."""
    assert from_json(written(record)) == record


@given(any_record())
def test_a_number_that_is_not_finite_is_null_and_comes_back_as_nan(record: Record) -> None:
    again = from_json(written(record))
    assert again is not None
    assert repr(again) == repr(record)


@pytest.mark.parametrize(
    ("field", "written_as"), [("loss", math.inf), ("ema_loss", math.nan), ("bits_per_byte", math.inf)]
)
def test_infinity_is_null_too(field: str, written_as: float) -> None:
    line = written(dataclasses.replace(VALIDATION, **{field: written_as}))
    assert line[field] is None
    assert math.isnan(getattr(from_json(line), field))


def test_what_is_not_known_yet_differs_from_what_is_not_finite() -> None:
    unknown = dataclasses.replace(TRAIN, seconds_left=None)
    assert written(unknown)["seconds_left"] is None
    assert from_json(written(unknown)) == unknown


def test_a_field_that_a_run_does_not_have_is_left_out() -> None:
    assert "mfu_dense" not in to_json(TRAIN)
    assert "ema_loss" not in to_json(VALIDATION)
    known = dataclasses.replace(TRAIN, mfu_computed=0.4, mfu_dense=0.5)
    assert list(to_json(known))[-4:] == ["mfu_computed", "mfu_dense", "memory_bytes", "layers"]
    assert from_json(written(known)) == known


def test_alarms_are_written_where_there_are_some() -> None:
    """Trackers get their number, also where it is 0, so that a curve shows when they end."""
    assert "alarms" not in to_json(TRAIN)
    alarmed = dataclasses.replace(TRAIN, alarms=(HeadAlarm(layer=0, head=3, state="sink"),))
    assert written(alarmed)["alarms"] == [{"layer": 0, "head": 3, "state": "sink"}]
    assert from_json(written(alarmed)) == alarmed
    assert numbers(alarmed)["train/alarms"] == 1


@given(any_record(finite=True), st.dictionaries(st.text(min_size=20), st.none() | st.text() | st.integers()))
def test_fields_of_a_later_version_are_ignored(record: Record, later: dict[str, Any]) -> None:
    assert from_json(written(record) | later) == record


@pytest.mark.parametrize("kind", ["probe", "", None, 3, ["train"], {"a": 1}], ids=str)
def test_kinds_of_a_later_version_are_no_record(kind: object) -> None:
    assert from_json({"step": 3, "kind": kind, "loss": 2.0}) is None


def test_an_early_version_did_not_count_everything() -> None:
    """Its validations still count for the patience of a run."""
    early = from_json({"step": 5, "kind": "validation", "loss": 2.5, "tokens": 64, "windows": 2})
    assert isinstance(early, ValidationRecord)
    assert (early.loss, early.text_bytes, early.ema_loss) == (2.5, None, None)
    assert math.isnan(early.bits_per_byte)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "3"}, {"step": 3.0}, {"step": True}, {"loss": "2.5"}, {"loss": [2.5]}, {"loss": True}, {"tokens": 1.5},
        {"tokens": None}, {"layers": 3}, {"layers": [3]}, {"layers": [{}]}, {"layers": None}, {"loss": 10**400},
    ],
    ids=str,
)  # fmt: skip
def test_a_record_with_a_value_of_another_type_is_none(changes: dict[str, Any]) -> None:
    """Whoever reads a record can trust its types."""
    assert from_json(written(TRAIN)) is not None
    assert from_json(written(TRAIN) | changes) is None


def test_a_whole_number_is_a_number() -> None:
    read = from_json(written(TRAIN) | {"loss": 2})
    assert read == dataclasses.replace(TRAIN, loss=2.0)
    assert isinstance(getattr(read, "loss"), float)  # noqa: B009 - of whatever was read


def test_trackers_get_the_numbers() -> None:
    assert numbers(ONE_OF_EACH[4]) == {}
    found = numbers(dataclasses.replace(TRAIN, seconds_left=None))
    assert found["train/loss"] == 2.5
    assert found["train/layer 1/effective_support"] == 9.0
    assert not [name for name in found if name.rpartition("/")[2] in ("step", "kind", "layer", "seconds_left")]
    assert found["train/alarms"] == 0
    assert len(found) == 10 + 2 * 5
    assert all(isinstance(value, (int, float)) for value in found.values())


@pytest.mark.parametrize("kind", [*KINDS.values(), LayerRecord, HeadAlarm], ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_means(kind: type) -> None:
    assert kind.__doc__
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        [about] = [one for one in hints[field.name].__metadata__ if isinstance(one, About)]
        assert len(about.meaning.split()) > 1, f"{kind.__name__}.{field.name} has no meaning"


def test_layers_are_in_their_order() -> None:
    read = from_json(written(TRAIN))
    assert read == TRAIN
    assert TRAIN.layers[0] == LAYER
