"""Evaluation: a model and a split → loss, perplexity, bits per byte."""

from cda_cli.evaluation.cuts import Cut, parse_cuts
from cda_cli.evaluation.evaluate import CutEvaluation, Evaluation, bits_per_byte, evaluate, evaluate_cuts

__all__ = ["Cut", "CutEvaluation", "Evaluation", "bits_per_byte", "evaluate", "evaluate_cuts", "parse_cuts"]
