"""Generation: a model and prompts → tokens."""

from cda_cli.generation.generate import Generation, Reason, generate
from cda_cli.generation.requests import Generated, Request, SamplingSettings
from cda_cli.generation.sampling import filtered_distribution

__all__ = [
    "Generated",
    "Generation",
    "Reason",
    "Request",
    "SamplingSettings",
    "filtered_distribution",
    "generate",
]
