"""The metrics of a run that has finished, by name: what it recorded, and what its evaluation found."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from cda_cli.comparison.recorded import RecordedRun
from cda_cli.conditions import metrics_of
from cda_cli.sweep.spec import METRICS


def metrics_of_run(run: RecordedRun) -> dict[str, float]:
    """The metrics of a run by name, those of its last validation among them; NaN where it recorded none.

    Measures of attention are means over the layers of the last train record.
    """
    best = min(run.validation, key=lambda point: point.loss, default=None)
    last = run.validation[-1] if run.validation else None
    layers: Mapping[str, Callable[[Any], float]] = {
        "effective_support": lambda layer: layer.effective_support,
        "sparsity_k": lambda layer: layer.sparsity_k,
        "active_units": lambda layer: layer.active_units,
        "active_blocks": lambda layer: math.nan if layer.active_blocks is None else layer.active_blocks,
    }
    found = {
        "loss": last.loss if last else math.nan,
        "bits_per_byte": last.bits_per_byte if last else math.nan,
        "best_loss": best.loss if best else math.nan,
        "best_bits_per_byte": best.bits_per_byte if best else math.nan,
        "best_ema_loss": min(
            (point.ema_loss for point in run.validation if not math.isnan(point.ema_loss)), default=math.nan
        ),
        "tokens": run.tokens,
        "steps": run.training[-1].step if run.training else math.nan,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens_per_second,
        "memory_bytes": run.memory_bytes,
        **{name: statistics.fmean(map(of, run.layers)) if run.layers else math.nan for name, of in layers.items()},
    }
    return {name: found[name] for name in METRICS}


def metrics_of_evaluation(document: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of the document of `cda eval --json`, as docs/sweeps.md names them."""
    return metrics_of({"eval": document})
