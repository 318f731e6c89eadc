"""One record of each kind, and any record at all."""

from __future__ import annotations

import math
from dataclasses import MISSING, Field, fields, replace
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from cda_cli.runs.records import (
    KINDS,
    CheckpointRecord,
    InitRecord,
    LayerRecord,
    Record,
    RefusedRecord,
    SampleRecord,
    SchemaRecord,
    TrainRecord,
    ValidationRecord,
)

LAYER = LayerRecord(
    layer=0, sparsity_k=1.5, effective_support=4.25, capped_share=0.125, distance_back=7.5, active_units=0.75
)
TRAIN = TrainRecord(
    step=10, loss=2.5, bits_per_byte=3.6067, lr=1e-3, eps=0.1, grad_norm=0.75, tokens=5120, tokens_per_second=999.9,
    seconds_left=61.0, data_wait=0.0123, memory_bytes=2**29,
    layers=(LAYER, replace(LAYER, layer=1, effective_support=9.0)),
)  # fmt: skip
VALIDATION = ValidationRecord(
    step=10, loss=2.625, standard_error=0.5, perplexity=math.exp(2.625), bits_per_byte=3.75, bits_per_byte_error=0.7,
    tokens=640, text_bytes=1600, windows=20,
)  # fmt: skip
ONE_OF_EACH: list[Record] = [
    SchemaRecord(step=0, version=1),
    TRAIN,
    RefusedRecord(step=11, saw="loss nan, gradient norm inf", in_a_row=2),
    VALIDATION,
    SampleRecord(step=10, text="a\u2028b▸c"),
    CheckpointRecord(step=10, path="runs/x/checkpoints/step-00000010"),
    InitRecord(
        step=0, path="runs/y/checkpoints/step-00000020", from_step=20, file="ema.safetensors", sha256="00ff" * 16
    ),
]  # fmt: skip

VALUES: dict[type, st.SearchStrategy[Any]] = {int: st.integers(0, 2**63), str: st.text(), NoneType: st.none()}


def any_record(finite: bool = False) -> st.SearchStrategy[Record]:
    """Records of every kind, with every value that a field can have; `finite`: with no NaN."""
    return st.one_of([_any(kind, finite) for kind in KINDS.values()])


def _any(kind: type[Any], finite: bool) -> st.SearchStrategy[Any]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: _value(hints[field.name], field, finite) for field in fields(kind)})


def _value(hint: Any, field: Field[Any], finite: bool) -> st.SearchStrategy[Any]:
    if get_origin(hint) is tuple:
        return st.lists(_any(get_args(hint)[0], finite), max_size=3).map(tuple)
    kinds = get_args(hint) or (hint,)
    null = NoneType in kinds and field.default is MISSING  # which is then no number that is not finite
    numbers = st.floats(allow_nan=not (finite or null), allow_infinity=False)
    return st.one_of([numbers if one is float else VALUES[one] for one in kinds])
