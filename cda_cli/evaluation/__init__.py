"""Evaluation: a model and a split → loss, perplexity, bits per byte, with errors, and paired differences."""

from cda_cli.evaluation.checkpoints import Plan, TextEvaluation, evaluate_readings, open_readings
from cda_cli.evaluation.comparison import Comparison, Estimate
from cda_cli.evaluation.evaluate import Evaluation, bits_per_byte, evaluate, summarise
from cda_cli.evaluation.intervals import Units, windows_as_units
from cda_cli.evaluation.losses_file import LossesFile
from cda_cli.evaluation.sums import AS_IT_IS, Sums, Way, joined, measure

__all__ = [
    "AS_IT_IS",
    "Comparison",
    "Estimate",
    "Evaluation",
    "LossesFile",
    "Plan",
    "Sums",
    "TextEvaluation",
    "Units",
    "Way",
    "bits_per_byte",
    "evaluate",
    "evaluate_readings",
    "joined",
    "measure",
    "open_readings",
    "summarise",
    "windows_as_units",
]
