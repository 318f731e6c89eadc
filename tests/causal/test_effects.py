"""What is made of the losses: a choice that is held out, and the picture of the cuts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cda_cli.causal import Effects, draw_cuts
from cda_cli.causal.checks import Prepared
from cda_cli.causal.cuts import parse_cuts
from cda_cli.data import Tokens
from cda_cli.errors import ConfigError
from cda_cli.evaluation import Sums, windows_as_units
from cda_cli.model import Transformer
from cda_cli.plots import STYLES, Point, Style, draw_line, new_figure, require_plot
from tests.causal.models import (
    build,
    content_head,
    content_text,
    effects_of,
    local_head,
    local_text,
    text,
)

BITS = 0.6931471805599453  # nats


def effects_with(per_window: list[list[float]], tolerance: float | None = None) -> Effects:
    """The cuts top:1, top:2 … of one byte per window, which cost so many bits in each window."""
    count = len(per_window[0])
    ones = torch.ones(count, dtype=torch.int64)
    whole = torch.full((count,), 3.0, dtype=torch.float64)
    costs = [torch.tensor(cost, dtype=torch.float64) * BITS for cost in per_window]
    none = torch.empty(count, 0, dtype=torch.float64)
    sums = [Sums(nats, ones, ones, none) for nats in (whole, *(whole + cost for cost in costs))]
    cuts = parse_cuts([f"top:{number}" for number in range(1, len(costs) + 1)])
    return Prepared(list(cuts), None).effects(sums, windows_as_units(count), tolerance)


def test_the_number_of_keys_is_chosen_on_one_half_and_reported_on_the_other() -> None:
    """top 2 is enough in the windows 0, 2, 4 … alone, so it is chosen there, and its cost shows in the rest."""
    (found,) = effects_with([[0.5] * 40, [0.0, 0.3] * 20, [0.0] * 40], 0.01).held_out
    assert found.kept == 2
    assert found.chosen_on is not None
    assert found.difference is not None
    assert found.chosen_on.value == pytest.approx(0)
    assert found.difference.value == pytest.approx(0.3)
    assert found.as_dict()["difference_interval"] == pytest.approx([0.3, 0.3])
    assert found.as_dict()["name"] == "held-out[top]"


def test_the_whole_interval_must_be_within_the_tolerance() -> None:
    """The mean cost of top 1 is 0.005, but it comes from a few windows, so it may as well be above 0.01."""
    rare = [0.1 if window % 40 == 0 else 0.0 for window in range(80)]
    assert sum(rare[::2]) / 40 == pytest.approx(0.005)
    (found,) = effects_with([rare, [0.001] * 80], 0.01).held_out
    assert found.kept == 2


def test_none_may_suffice() -> None:
    (found,) = effects_with([[0.5] * 20, [0.1] * 20], 0.01).held_out
    assert found.kept is None
    assert found.as_dict()["kept"] is None


def test_a_single_window_has_no_half_to_choose_on() -> None:
    found = effects_with([[0.0]], 0.01)
    assert [one.kept for one in found.held_out] == [None]
    assert found.controls == []


def planted_effects(model: Transformer, tokens: Tokens) -> Effects:
    return effects_of(model, tokens, ["top:1..4", "recent:1..4", "random:1..4"], tolerance=0.01)


def test_controls_tell_a_head_that_reads_by_content_from_one_that_reads_nearby() -> None:
    """One key suffices for both. A window of as many does as well only where the head reads its neighbour."""
    content = planted_effects(content_head(), content_text(24))
    assert [(one.choice, one.kept) for one in content.controls] == [("recent", 1), ("random", 1)]
    assert content.as_dict()["controls"][0]["name"] == "control[recent]"
    assert content.as_dict()["controls"][0]["difference"] > 0.01
    suffices, controls = content.verdict()
    assert suffices.startswith("1 key suffices: +0.000 ± ")
    assert controls.startswith("A window of the latest 1 does worse (+")
    assert "; a random choice of 1 does worse (+" in controls
    # Two keys of a local head are the query itself and the key that it reads.
    local = effects_of(local_head(), local_text(24), ["top:2,4", "recent:2,4"], tolerance=0.01)
    assert "A window of the latest 2 does as well (+0.000" in local.verdict()[1]


def test_a_verdict_claims_no_more_than_was_seen() -> None:
    few = effects_with([[0.0] * 3], 0.01).verdict()
    assert few == ["3 windows are too few to say how many keys suffice; here 1 key cost +0.000 ± 0.000 bits per byte."]
    fewest = effects_with([[0.5] * 3, [0.0, 0.002, 0.004], [0.0] * 3], 0.01).verdict()
    assert fewest[0].endswith("; here 2 keys cost +0.002 ± 0.001 bits per byte.")
    single = effects_with([[0.5], [0.002]], 0.01).verdict()
    assert single == ["1 window is too few to say how many keys suffice; here 2 keys cost +0.002 bits per byte."]
    unsure = effects_with([[0.5] * 40, [0.0, 0.3] * 20, [0.0] * 40], 0.01).verdict()
    assert unsure[0] == (
        "2 keys suffice on half of the windows; on the rest the cost is +0.300 ± 0.000 bits per byte, which is not "
        "sure to be 0.01 or less."
    )
    none = effects_with([[0.5] * 20, [0.1] * 20], 0.01).verdict()
    assert none == [
        "No number of keys that was tried is sure to cost at most 0.01: even 2 keys cost +0.100 ± 0.000 bits per byte."
    ]


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_a_picture_is_drawn_in_each_format(tmp_path: Path, ending: str) -> None:
    effects = effects_of(build(attention="softmax"), text(70), ["top:1,4", "recent:1,4:drop"])
    picture = tmp_path / f"curve{ending}"
    require_plot(picture)
    draw_cuts(picture, [effects, effects])
    content = picture.read_bytes()
    assert content.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[ending])
    if ending == ".svg":  # Text stays text.
        for words in (b"keys kept for each query", b"top, checkpoint 1", b"recent-drop, checkpoint 2", b"all keys"):
            assert words in content


@pytest.mark.parametrize(("name", "words"), [("curve.gif", ".png, .svg, .pdf"), ("no/curve.png", "no folder")])
def test_what_cannot_be_drawn_is_refused_before_anything_is_computed(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        require_plot(tmp_path / name)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_no_two_lines_of_a_picture_look_alike(style: Style) -> None:
    """A legend of two tasks and two checkpoints has ten lines, more than there are colours."""
    _, (axes,) = new_figure(style, 1, 1)
    for number in range(20):
        draw_line(axes, style, number, str(number), [Point(1, 1), Point(2, 2)])
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}) == 20
