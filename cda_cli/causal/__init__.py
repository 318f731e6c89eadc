"""Causal checks: a model is changed without training, and its loss compared on the same text (docs/causal-checks.md).

words of a command line → `Wanted` → `prepare` makes the interventions and measures what they need → `Prepared.ways` of
measuring the model → `Prepared.effects`, which are paired differences of the loss. `Checks` does so for checkpoints.
"""

from cda_cli.causal.checks import Checks, Prepared, Wanted, prepare
from cda_cli.causal.effects import Effect, Effects, HeldOut
from cda_cli.causal.pictures import draw_cuts

__all__ = ["Checks", "Effect", "Effects", "HeldOut", "Prepared", "Wanted", "draw_cuts", "prepare"]
