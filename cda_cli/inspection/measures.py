"""The tables of measures: which figure of a row has which name, and which function computes it.

Rows sum to k, so each measure says what it normalises by. docs/inspection.md explains each name.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from cda_cli.errors import ConfigError, did_you_mean
from cda_cli.inspection.agreement import divergence
from cda_cli.inspection.budgets import capped_share, gate_equivalent, row_sum, row_sum_error, sparsity_k
from cda_cli.inspection.concentration import keys_95, participation, rest_after, support
from cda_cli.inspection.patterns import PATTERNS, distance_back, null_share, pattern_share
from cda_cli.inspection.seen_rows import SeenRows
from cda_cli.inspection.written import moved_norm, written_norm

Measure = Callable[[SeenRows], Tensor]  # a figure of each row, float64 [B, H, t]; NaN where it has no meaning

# What training records of each layer (`cda_cli.runs.records.LayerRecord`).
RECORDED: dict[str, Measure] = {
    "sparsity_k": sparsity_k,
    "effective_support": support,
    "capped_share": capped_share,
    "distance_back": distance_back,
}
RESTS = (1, 4, 16, 64)
MEASURES: dict[str, Measure] = {
    **RECORDED,
    "row_sum": row_sum,
    "row_sum_error": row_sum_error,
    "gate_equivalent": gate_equivalent,
    "participation": participation,
    "keys_95": keys_95,
    **{f"rest_{keys}": rest_after(keys) for keys in RESTS},
    "null_share": null_share,
    **{f"{name}_share": pattern_share(pattern) for name, pattern in PATTERNS.items()},
    "divergence": divergence,
    "moved_norm": moved_norm,
    "written_norm": written_norm,
}
# The figures of a head as a whole, which the rows of many queries make together (`patterns`, `watchers`).
OF_HEADS = (
    "sparsity_k_variance",
    "share_at_smallest_k",
    "share_at_largest_k",
    "median_distance",
    "sink_mass",
    "sink_rate",
    *(f"{name}_lift" for name in PATTERNS),
)
NAMES = (*MEASURES, *OF_HEADS)
GRADIENTS = ("importance", "sparsity_k_gradient")  # of a head too, from backward passes, so only where asked for
OF_BUDGET = ("capped_share", "gate_equivalent")  # of a head too, but mean nothing where rows have no budget k
# Those whose quantiles over rows are reported.
QUANTILES = ("sparsity_k", "effective_support", "keys_95")


def check_measure(name: str) -> None:
    """Raises ConfigError if no measure of a head has this name."""
    if name not in (*NAMES, *GRADIENTS):
        raise ConfigError(f"there is no measure {name!r}: {did_you_mean(name, (*NAMES, *GRADIENTS))}")
