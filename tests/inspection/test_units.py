"""The census of feed-forward units, and massive activations, on activations whose figures are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cda_cli.inspection import RecordWatcher, units
from cda_cli.inspection.residual import ResidualStream, massive_activations
from cda_cli.inspection.units import UnitCensus, UnitFigures, units_in_use
from cda_cli.model.observe import ObservedAttention, ObservedFeedForward, observing
from tests.model.cases import build, tiny, tokens


def census(activations: Tensor, to_out: Tensor | None = None, chosen: Tensor | None = None) -> UnitFigures:
    counted = UnitCensus()
    columns = torch.eye(activations.shape[-1]) if to_out is None else to_out
    counted.add(ObservedFeedForward(0, activations, columns, chosen))
    return counted.figures()


def test_the_fewest_units_that_hold_the_output_are_in_use() -> None:
    lengths = torch.tensor([[96.0, 2.0, 1.5, 0.5], [1, 1, 1, 1], [0, 0, 0, 7], [0, 0, 0, 0]])
    assert units_in_use(lengths).tolist() == [
        [True, True, True, False],
        [True, True, True, True],
        [False, False, False, True],
        [False, False, False, False],
    ]


def test_a_unit_counts_by_what_it_adds_not_by_its_activation() -> None:
    """A small activation with a long column of the matrix adds as much as a large one with a short column."""
    activations = torch.tensor([[[1e-6, 1.0, 1.0]]])
    found = census(activations, torch.diag(torch.tensor([1e9, 1.0, 0.0])))
    assert found.units_99 == 1
    assert found.dead_units == 2


def test_dead_units_and_those_that_are_always_on() -> None:
    activations = torch.tensor([[[1.0, 0, 1, 0], [1, 0, 0, 0]], [[-2, 0, 2, 0], [1, 0, 1, 0]]])
    found = census(activations)
    assert (found.units, found.dead_units, found.always_on_units) == (4, 2, 1)
    assert found.units_99 == (2 + 1 + 2 + 2) / 4
    assert found.units_99_p95 == 2
    assert found.neighbour_overlap == pytest.approx((1 + 2) / (2 + 2))


def test_a_block_is_active_where_it_is_chosen_even_if_all_its_units_are_zero() -> None:
    activations = torch.tensor([[[1.0, 2, 0, 0, 0, 0], [0, 0, -1e-9, 0, 0, 0]], [[0, 0, 0, 3, 0, 0], [0] * 6]])
    chosen = torch.tensor([[[1, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 0]]]).bool()
    found = census(activations, chosen=chosen)
    assert (found.blocks, found.dead_blocks, found.active_blocks) == (3, 1, 4 / 4)
    assert found.nonzero_units == 4 / 4
    assert census(activations).blocks == 0


def test_neighbours_with_the_same_units_overlap_and_others_do_not() -> None:
    same, none = torch.eye(4)[:1].repeat(5, 1)[None], torch.eye(4)[None]
    assert census(same).neighbour_overlap == census(same).chance_overlap == 1
    assert census(none).neighbour_overlap == 0
    assert census(none).chance_overlap == pytest.approx(0.25 / (2 - 0.25))


@pytest.mark.parametrize("entries", [1, 2 * 8 * 3, 10**6])
def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    activations = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0)) ** 3
    whole = census(activations)
    monkeypatch.setattr(units, "ENTRIES", entries)
    assert census(activations) == pytest.approx(whole)


def test_massive_activations_are_large_and_far_above_the_median() -> None:
    x = torch.full((3, 8, 16), 0.1)
    x[0, 0, 3], x[1, 2, 5], x[2] = -500.0, 99.0, 200.0
    assert massive_activations(x).nonzero().tolist() == [[0, 0, 3]]
    stream = ResidualStream()
    stream.add(x[:2])
    stream.add(x[2:])
    found = stream.figures()
    assert found.massive_activations == pytest.approx(1 / 3)
    assert found.massive_channels == [3]
    assert found.largest_activation == 500
    assert found.largest_over_median == pytest.approx(5000)


@pytest.mark.parametrize(("router", "k"), [("hard-topk-blocks", 2.0), ("blocks", 3.0)])
def test_training_records_how_many_blocks_a_router_chooses(router: str, k: float) -> None:
    """With soft top-k another number on each token."""
    model, watcher, chosen = build(tiny(ff=router, ff_k=k, ff_tolerance=0.3)), RecordWatcher(), []

    def see(seen: ObservedAttention | ObservedFeedForward) -> None:
        if isinstance(seen, ObservedFeedForward):
            assert seen.chosen is not None
            chosen.append(seen.chosen.sum(-1).double().mean().item())

    with torch.no_grad():
        with observing(model, see):
            model(tokens(model.config))
        with watcher.watching(model):
            model(tokens(model.config))
    assert [layer.active_blocks for layer in watcher.recorded().layers] == chosen
    assert (chosen == [2.0, 2.0]) == (router == "hard-topk-blocks")
