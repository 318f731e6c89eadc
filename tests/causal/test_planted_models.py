"""Models whose weights are written by hand, so that each causal check has a known answer."""

from __future__ import annotations

import pytest

from tests.causal.models import (
    content_head,
    content_text,
    differences,
    effects_of,
    even_heads,
    local_head,
    local_text,
    text,
)

CONTROLS = ("recent", "sink", "distance-matched", "random")


def test_a_content_head_needs_its_top_key_and_no_control_has_it() -> None:
    """The marker may stand anywhere, so only its content finds it."""
    found = differences(effects_of(content_head(), content_text(24), ["top:1,2", *(f"{c}:2" for c in CONTROLS)]))
    assert found["top[1]"] == pytest.approx(0, abs=1e-3)
    assert found["top[2]"] == pytest.approx(0, abs=1e-3)
    for control in CONTROLS:
        assert found[f"{control}[2]"] > 0.1, f"{control} keys let the marker through"


def test_a_local_head_is_as_well_served_by_the_latest_keys() -> None:
    """And by those at the offsets of another query: that few keys suffice does not show a selection by content."""
    cuts = ["top:2", "recent:2,1", "distance-matched:2", "random:2"]
    found = differences(effects_of(local_head(), local_text(24), cuts))
    for enough in ("top[2]", "recent[2]", "distance-matched[2]"):
        assert found[enough] == pytest.approx(0, abs=1e-3), enough
    assert found["recent[1]"] > 1, "the key before the query is needed"
    assert found["random[2]"] > 1


@pytest.mark.parametrize(("eps", "share"), [(1.0, 1.0), (1e-4, 0.0)])
def test_the_gate_control_tells_whether_anything_is_capped(eps: float, share: float) -> None:
    """Scores that differ little cap nothing at ε = 1, where each row is k·softmax; at ε → 0 each row caps its key."""
    model = even_heads(attn_k=1.5, attn_eps=eps)
    (gate,) = effects_of(model, text(70), substitutes=["gate"]).effects
    assert gate.as_dict()["gate_equivalent_rows"] == pytest.approx(share, abs=0.01)
    if share:
        assert gate.difference.value == pytest.approx(0, abs=1e-6)
        assert gate.difference.error == pytest.approx(0, abs=1e-6)
    else:
        assert abs(gate.difference.value) > 1e-3


def test_the_one_head_that_matters_comes_first() -> None:
    """By its ablation and by its gradient; a head that reads evenly and adds nothing costs nothing."""
    found = effects_of(content_head(heads=3), content_text(24), ablated=["heads", "heads:gradient"])
    by_name = {effect.intervention.name: effect for effect in found.effects}
    costs = [by_name[f"head[0.{head}]"].difference.value for head in range(3)]
    assert costs[:2] == pytest.approx([0, 0], abs=1e-5)
    assert costs[2] > 0.1
    importances = [by_name[f"head[0.{head}]"].as_dict()["gradient"] for head in range(3)]
    assert importances[:2] == pytest.approx([0, 0], abs=1e-5)
    assert importances[2] > 1e-3
    cumulative = [by_name[f"heads-by-gradient[{count}]"].difference.value for count in (1, 2, 3)]
    assert cumulative == pytest.approx(costs, abs=1e-5), "the head that matters is ablated last"
    assert found.rank_correlations()["gradient"] == pytest.approx(0.87, abs=0.14)
