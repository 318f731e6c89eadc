"""What the interval of a difference says of a claim."""

from __future__ import annotations

import pytest

from cda_cli.sweep.claims import Decision
from cda_cli.sweep.spec import Claim
from cda_cli.sweep.student_t import Mean


@pytest.mark.parametrize(
    ("claim", "low", "high", "verdict"),
    [
        ("non-inferior", -0.2, 0.09, "holds"),
        ("non-inferior", -0.2, 0.11, "not decided"),
        ("non-inferior", 0.11, 0.2, "refuted"),
        ("superior", -0.2, -0.01, "holds"),
        ("superior", -0.2, 0.01, "not decided"),
        ("superior", -0.09, 0.2, "refuted"),
    ],
)
@pytest.mark.parametrize("better", ["lower", "higher"])
def test_the_whole_interval_decides(claim: str, low: float, high: float, verdict: str, better: str) -> None:
    said = Claim.model_validate({"arm": "a", "control": "b", "claim": claim, "margin": 0.1, "better": better})
    ends = (low, high) if better == "lower" else (-high, -low)
    assert Decision(said, Mean(sum(ends) / 2, 0.1, *ends, 3), 3).verdict == verdict


def test_what_is_better_by_less_than_would_matter_is_said_to_be() -> None:
    said = Claim.model_validate({"arm": "a", "control": "b", "claim": "superior", "margin": 0.1})
    words = "All of the interval is better by less than 0.1."
    assert words in Decision(said, Mean(-0.05, 0.01, -0.07, -0.03, 3), 3).words()
    assert words not in Decision(said, Mean(-0.08, 0.01, -0.11, -0.05, 3), 3).words()
