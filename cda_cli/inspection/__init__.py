"""Inspection: a model and text → what each layer and head selects."""

from cda_cli.inspection.collect_rows import RowCollector
from cda_cli.inspection.concentration import effective_support
from cda_cli.inspection.gradients import gradients
from cda_cli.inspection.inspect import inspect, parse_selection
from cda_cli.inspection.live_heads import LiveCollector, LiveHead
from cda_cli.inspection.measures import GRADIENTS, MEASURES, NAMES, OF_BUDGET, QUANTILES, check_measure
from cda_cli.inspection.report import HeadReport, LayerReport, Report, named_metrics
from cda_cli.inspection.store import RowStore, StoredHead, StoredRow, parse_size
from cda_cli.inspection.watchers import Recorded, RecordWatcher, ReportWatcher, Watcher

__all__ = [
    "GRADIENTS",
    "MEASURES",
    "NAMES",
    "OF_BUDGET",
    "QUANTILES",
    "HeadReport",
    "LayerReport",
    "LiveCollector",
    "LiveHead",
    "RecordWatcher",
    "Recorded",
    "Report",
    "ReportWatcher",
    "RowCollector",
    "RowStore",
    "StoredHead",
    "StoredRow",
    "Watcher",
    "check_measure",
    "effective_support",
    "gradients",
    "inspect",
    "named_metrics",
    "parse_selection",
    "parse_size",
]
