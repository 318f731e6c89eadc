"""Claims that the file of a sweep makes before its runs, and what the runs say of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from cda_cli import strict_json
from cda_cli.plurals import counted
from cda_cli.storage import write_file
from cda_cli.sweep.spec import Claim, Spec
from cda_cli.sweep.student_t import MOST_SEEDS, POWER, Mean, mean_of, seeds_needed

FILE = "registered.json"

Verdict = Literal["holds", "refuted", "not decided"]


@dataclass(frozen=True)
class Decision:
    """A claim, and the `difference` of its arm to its control, paired by seed, as far as the `seeds` have runs."""

    claim: Claim
    difference: Mean
    seeds: int

    @property
    def worse(self) -> tuple[float, float]:
        """The interval of how much worse the arm is than the control."""
        low, high = self.difference.low, self.difference.high
        return (low, high) if self.claim.better == "lower" else (-high, -low)

    @property
    def verdict(self) -> Verdict:
        """By the whole interval: it is on one side of what the claim says, or on the other, or on both."""
        low, high = self.worse
        if self.claim.kind == "non-inferior":
            most, least = self.claim.margin, self.claim.margin
        else:  # An arm that is better by less than the margin is not worth its change.
            most, least = 0.0, -self.claim.margin
        return "holds" if high < most else "refuted" if low > least else "not decided"

    @property
    def deviation(self) -> float:
        """That of the paired differences: as measured or, before there are two, as the file expects it."""
        measured = self.difference.deviation
        return self.claim.spread or math.nan if math.isnan(measured) else measured

    @property
    def seeds_needed(self) -> int | None:
        """How many seeds decide the claim with a power of POWER.

        It holds for arms that are equal in truth if the claim is that one is non-inferior, and for an arm that is
        better by the margin if the claim is that it is superior. None without a deviation, and where it takes too many.
        """
        return None if math.isnan(self.deviation) else seeds_needed(self.deviation, self.claim.margin)

    def words(self) -> list[str]:
        """The claim and what came of it, in sentences."""
        claim, difference = self.claim, self.difference
        measure = (
            claim.metric
            if claim.of_control is None
            else f"{claim.metric} against {claim.of_control} of {claim.control}"
        )
        if claim.kind == "non-inferior":
            said = f"{claim.arm} is worse than {claim.control} by less than {claim.margin:g}"
            supposed = "if they are equal"
        else:
            said = f"{claim.arm} is better than {claim.control}, and {claim.margin:g} would matter"
            supposed = f"if it is better by {claim.margin:g}"
        found = [f"Claim: {said} ({measure}; {claim.kind})."]
        if math.isnan(difference.low):
            found.append(
                f"Not decided: {counted(difference.seeds, 'seed has', 'seeds have')} both runs; two or more decide."
            )
        else:
            interval = f"95 % interval {difference.low:+.4f} … {difference.high:+.4f}"
            # Those that are missing may be runs that failed for what the arm changes.
            is_whole = difference.seeds == self.seeds
            seeds = counted(self.seeds, "seed") if is_whole else f"{difference.seeds} of {self.seeds} seeds"
            verdict = self.verdict.capitalize() + " so far" * (not is_whole)
            found.append(f"{verdict}: difference {difference.value:+.4f}, {interval}, over {seeds}.")
            if claim.kind == "superior" and self.verdict == "holds" and self.worse[0] > -claim.margin:
                found.append(f"All of the interval is better by less than {claim.margin:g}.")
        if not math.isnan(self.deviation):
            needed = self.seeds_needed
            source = "expected" if math.isnan(difference.deviation) else "measured"
            takes = counted(needed, "seed") if needed else f"more than {MOST_SEEDS:,} seeds"
            found.append(f"By the {source} deviation {self.deviation:.4f} of differences it takes {takes}, {supposed}.")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Its fields in JSON."""
        return {
            **self.claim.model_dump(by_alias=True),
            "difference": self.difference.as_dict(),
            "verdict": self.verdict,
            "deviation": self.deviation,
            "power": POWER,
            "seeds_needed": self.seeds_needed,
        }


def decide(spec: Spec, metrics: Callable[[str, str], Sequence[float]]) -> list[Decision]:
    """What the runs say of each claim; `metrics` gives those of an arm by the seeds, NaN where there is none."""
    decisions = []
    for claim in spec.compare:
        own = metrics(claim.arm, claim.metric)
        other = metrics(claim.control, claim.of_control or claim.metric)
        differences = [one - two for one, two in zip(own, other, strict=True)]
        decisions.append(
            Decision(claim, mean_of([value for value in differences if math.isfinite(value)]), len(differences))
        )
    return decisions


def register(spec: Spec, out: Path) -> None:
    """Keeps what a sweep claims when it begins, so that a later change shows."""
    if not (out / FILE).exists():
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        kept = {"registered": when, **_plain(spec), "seeds": list(spec.seeds)}
        write_file(out / FILE, strict_json.dumps(kept, indent=2).encode())


def registration(spec: Spec, out: Path) -> list[str]:
    """When the claims were registered, and what has changed since, in sentences."""
    try:
        kept = json.loads((out / FILE).read_text(encoding="utf-8"))
        when, seeds = str(kept["registered"])[:10], set(kept["seeds"])
        is_changed = any(kept.get(key, value) != value for key, value in _plain(spec).items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return ["No run has begun, so nothing is registered."]
    if is_changed:
        return [
            f"The claims, the evaluations or the rule of drop were changed after the runs began on {when}: what they "
            "say was not registered."
        ]
    found = [f"Registered on {when}, before the first run."]
    if dropped := sorted(seeds - set(spec.seeds)):
        found.append(
            f"Of the registered seeds, {', '.join(map(str, dropped))} {'is' if len(dropped) == 1 else 'are'} left out "
            "now: seeds that are chosen after a look at their runs decide nothing."
        )
    elif len(spec.seeds) > len(seeds):
        found.append(
            f"The runs began with {counted(len(seeds), 'seed')}, and there are {len(spec.seeds)} now: a claim that is "
            "looked at again with more seeds holds by chance more often than its level says."
        )
    return found


def _plain(spec: Spec) -> dict[str, Any]:
    """What the runs are to decide, in JSON: the claims, the evaluations that they name metrics of, what is dropped."""
    claims = [claim.model_dump(mode="json", by_alias=True) for claim in spec.compare]
    drop = spec.drop.model_dump(mode="json") if spec.drop else None
    return {"compare": claims, "eval": spec.eval.options() if spec.eval else [], "drop": drop}
