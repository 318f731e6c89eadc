"""The verdict of a report, in sentences."""

from __future__ import annotations

import math

from cda_cli.causal.effects import Effects
from cda_cli.inspection import HeadReport, Report
from cda_cli.plurals import counted

SINK_RATE = 0.5  # of the windows: a head with a sink in more of them rests on one


def verdict(report: Report, has_budget: bool, effects: Effects | None) -> list[str]:
    """Sentences with figures: how many keys hold a row, what the budget does, and where the rest goes.

    What causal checks found comes first, and the gate control says of the budget what the measures alone would say.
    """
    measured = [
        _concentrated(report),
        *([] if effects and effects.gates else [_budget(report, has_budget)]),
        _rest(report),
    ]
    return [*(effects.verdict() if effects else []), *measured]


def _concentrated(report: Report) -> str:
    keys = sorted(report.heads, key=lambda head: head.measures["keys_95"])
    mean, rest = (sum(head.measures[name] for head in keys) / len(keys) for name in ("keys_95", "rest_64"))
    spread = f", from {_keys(keys[0])} to {_keys(keys[-1])}" if len(keys) > 1 else ""
    return f"95% of the mass of a row is on {mean:.1f} keys on average{spread}; the largest 64 leave {rest:.1%}."


def _budget(report: Report, has_budget: bool) -> str:
    gates = [head.measures["gate_equivalent"] for head in report.heads]
    gated = [share for share in gates if not math.isnan(share)]
    if not has_budget:
        return "Rows sum to 1, without a budget and without caps."
    if not gated:
        return "No row sees more keys than its budget k, so every key is capped."
    return f"{sum(gated) / len(gated):.1%} of the rows that see more than k keys cap none: they are k times a softmax."


def _rest(report: Report) -> str:
    heads, layers = report.heads, report.layers
    sinks = sum(head.measures["sink_rate"] > SINK_RATE for head in heads)
    rested = f"{sinks} of {counted(len(heads), 'head')} {'rests' if 1 in (sinks, len(heads)) else 'rest'} on a sink"
    seen = [each.units for each in layers if each.units.units]  # not those of experts
    if not seen:
        return f"{rested}."
    used = sum(unit.units_99 / unit.units for unit in seen) / len(seen)
    dead = sum(unit.dead_units for unit in seen)
    units = f"{used:.1%} of the units make 99% of what the feed-forward adds, and {counted(dead, 'unit')} never did"
    return f"{rested}; {units}."


def _keys(head: HeadReport) -> str:
    return f"{head.measures['keys_95']:.1f} (head {head.layer}.{head.head})"
