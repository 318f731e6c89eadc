"""Causal checks: a model is changed without training, and its loss compared on the same text (docs/causal-checks.md).

words of a command line → `Wanted` → `prepare` makes the interventions and measures what they need → `Prepared.ways` of
measuring the model → `Prepared.effects`, which are paired differences of the loss. `check_text` does so for a model in
memory, `Checks` for checkpoints, and an `Examination` beside an inspection, with all that was `Examined` as its result.
"""

from cda_cli.causal.checks import Checks, Prepared, Wanted, check_text, prepare
from cda_cli.causal.effects import Control, Effect, Effects, HeldOut
from cda_cli.causal.examination import Examination, Examined
from cda_cli.causal.heads import rank_correlation
from cda_cli.causal.pictures import curve_points, draw_cuts

__all__ = [
    "Checks",
    "Control",
    "Effect",
    "Effects",
    "Examination",
    "Examined",
    "HeldOut",
    "Prepared",
    "Wanted",
    "check_text",
    "curve_points",
    "draw_cuts",
    "prepare",
    "rank_correlation",
]
