"""Inspection: a model and text → what each layer and head selects."""

from cda_cli.inspection.inspect import (
    FeedForwardReport,
    HeadReport,
    Report,
    Watcher,
    inspect,
    layer_means,
    parse_selection,
)
from cda_cli.inspection.measures import effective_support

__all__ = [
    "FeedForwardReport",
    "HeadReport",
    "Report",
    "Watcher",
    "effective_support",
    "inspect",
    "layer_means",
    "parse_selection",
]
