"""Results of `cda eval`: figures of a model on a text, and what cuts do to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cda_cli.console.base import out, plus_minus, print_pairs, table
from cda_cli.console.text import section
from cda_cli.plurals import counted

if TYPE_CHECKING:
    from cda_cli.evaluation import Comparison, CutEvaluation, Estimate
    from cda_cli.restore import Restored, TextSide


def show_evaluation(
    comparison: Comparison, compared: Sequence[CutEvaluation], restored: Restored, text: TextSide
) -> None:
    result = comparison.evaluation()
    windows = counted(result.windows, "window")
    rows = {
        "checkpoint": f"{restored.path}{', averaged weights' if restored.averaged else ''}",
        "data": f"{text.description}, {text.split}",
        "tokens": f"{result.tokens:,} in {windows}, for {counted(result.text_bytes, 'byte')} of text",
        "loss": f"{plus_minus(result.loss, result.standard_error)} nats per token",
        "perplexity": f"{result.perplexity:.4g}",
        "bits per byte": plus_minus(result.bits_per_byte, result.bits_per_byte_error),
    }
    print_pairs(out(), rows)
    if not compared:
        return
    cuts = table("keys read", "bits per byte", "difference", "95 % interval")
    for one in compared:
        cuts.add_row(one.cut.description, f"{one.evaluation.bits_per_byte:.4f}", *difference_columns(one.difference))
    section("Cuts, on the same windows", cuts)


def difference_columns(difference: Estimate) -> tuple[str, str]:
    """A difference and its interval, with signs; – where there is no interval."""
    _, _, low, high = difference
    interval = "–" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"
    return f"{difference.value:+.4f}", interval
