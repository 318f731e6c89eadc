"""Generation: a model and a prompt → tokens."""

from cda_cli.generation.generate import SamplingSettings, filtered_distribution, generate

__all__ = ["SamplingSettings", "filtered_distribution", "generate"]
