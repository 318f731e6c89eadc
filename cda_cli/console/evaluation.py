"""Results of `cda eval`: figures of models on a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cda_cli.console.base import out, plus_minus, print_pairs, table
from cda_cli.console.text import section
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from cda_cli.evaluation import Estimate, TextEvaluation


def show_evaluation(result: TextEvaluation, *, averaged: bool) -> None:
    """Shows the figures of a checkpoint, or a table of several. `averaged` says whether their weights are averages."""
    several, suffix = len(result.readings) > 1, ", averaged weights" if averaged else ""
    names = [f"checkpoint {number}" if several else "checkpoint" for number in range(1, len(result.readings) + 1)]
    text, found = result.readings[0].text, result.comparison.evaluation()
    overlap = "disjoint" if result.stride == result.context else f"stride {result.stride:,}"
    rows = {
        **{name: f"{one.saved.path}{suffix}" for name, one in zip(names, result.readings, strict=True)},
        "data": f"{text.description}, {text.split}",
        "windows": f"at most {counted(result.context, 'token')}, {overlap}{_beyond(result)}",
        "counted": result.counted,
        "tokens": f"{found.tokens:,} in {_amount(result)}, for {counted(found.text_bytes, 'byte')} of text",
    }
    if several:
        print_pairs(out(), rows | {"95 % interval": _interval_words(result)})
        title = "Bits per byte ± standard error, and their difference from those of the first; loss in nats per token"
        section(title, _table(result))
    else:
        print_pairs(out(), rows | _figures(result))
    details = [result.details(number) for number in range(len(names))]
    if result.plan.by_position:
        section(
            "Loss by position, nats per token ± standard error",
            _positions([each["positions"] for each in details], names),
        )
    if result.plan.calibration:
        section("Calibration", _calibration([each["calibration"] for each in details], names))


def _beyond(result: TextEvaluation) -> str:
    """Says so where a window is longer than those of the training."""
    trained = min(reading.saved.config.model.seq_len for reading in result.readings)
    return f"; the training had {trained:,}" if result.context > trained else ""


def _amount(result: TextEvaluation) -> str:
    windows = counted(result.comparison.windows[0], "window")
    if not result.plan.per_document:
        return windows
    return f"{windows} of {counted(result.readings[0].documents, 'document')}"


def _figures(result: TextEvaluation) -> dict[str, str]:
    found, estimate = result.comparison.evaluation(), result.comparison.bits_per_byte()
    rows = {
        "loss": f"{plus_minus(found.loss, found.standard_error)} nats per token",
        "perplexity": f"{found.perplexity:.4g}",
        "bits per byte": plus_minus(found.bits_per_byte, found.bits_per_byte_error),
        "bits per word": f"{result.bits_per_word(0):.4f}",
    }
    if not math.isnan(estimate.low):
        rows["95 % interval"] = f"{estimate.low:.4f} to {estimate.high:.4f} bits per byte; {_interval_words(result)}"
    return rows


def _interval_words(result: TextEvaluation) -> str:
    units = result.comparison.units
    return f"from {units.blocks:,} {units.resampled}, resampled"


def _table(result: TextEvaluation) -> Table:
    made = table("checkpoint", "loss", "bits per byte", "difference", "95 % interval")
    for number in range(len(result.readings)):
        found = result.comparison.evaluation(number)
        difference = difference_columns(result.comparison.difference(number)) if number else ("", "")
        bits = plus_minus(found.bits_per_byte, found.bits_per_byte_error)
        made.add_row(str(number + 1), f"{found.loss:.4f}", bits, *difference)
    return made


def _positions(each: Sequence[Sequence[Mapping[str, Any]]], names: Sequence[str]) -> Table:
    made = table("tokens seen", "tokens", *(["loss"] if len(names) == 1 else names))
    for ranges in zip(*each, strict=True):
        first, last = ranges[0]["first"], ranges[0]["last"]
        losses = ["–" if math.isnan(one["loss"]) else plus_minus(one["loss"], one["standard_error"]) for one in ranges]
        made.add_row(str(last) if first == last else f"{first} to {last}", f"{ranges[0]['tokens']:,}", *losses)
    return made


def _calibration(each: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    made = table("", "expected calibration error", "accuracy", "confidence")
    for name, one in zip(names, each, strict=True):
        columns = (one[key] for key in ("expected_calibration_error", "accuracy", "confidence"))
        made.add_row(name, *(f"{value:.4f}" for value in columns))
    return made


def difference_columns(difference: Estimate) -> tuple[str, str]:
    """A difference and its interval, with signs; – where there is no interval."""
    _, _, low, high = difference
    interval = "–" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"
    return f"{difference.value:+.4f}", interval
