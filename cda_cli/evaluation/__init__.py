"""Evaluation: a model and a split → loss, perplexity, bits per byte."""

from cda_cli.evaluation.evaluate import Evaluation, bits_per_byte, evaluate

__all__ = ["Evaluation", "bits_per_byte", "evaluate"]
