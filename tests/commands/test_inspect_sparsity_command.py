"""`cda inspect-sparsity`: figures of each layer and head, and a picture of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.commands.helpers import Cda, assert_refused, metrics

HEAD = {
    "layer", "head", "sparsity_k", "row_sum", "row_sum_error", "effective_support", "attended_entries",
    "capped_share", "distance_back",
}  # fmt: skip
COLUMNS = "layer.head k row sum |Σλ − k| effective support λ > 1e-3 capped / k distance back"


def inspected(cda: Cda, *arguments: object) -> dict[str, Any]:
    result = cda("inspect-sparsity", *arguments, "--json", "--max-batches", 2)
    assert result.code == 0, result.err
    assert result.err == ""
    document = json.loads(result.out)
    assert isinstance(document, dict)
    return document


def trained(cda: Cda, tiny: Path, out: Path, *settings: object, steps: int = 1) -> Path:
    result = cda("train", "--config", tiny, "--out", out, "--steps", steps, *settings)
    assert result.code == 0, result.err
    return out


def test_json_has_every_figure_of_every_head(cda: Cda, finished: Path) -> None:
    found = inspected(cda, finished)
    assert set(found) == {"checkpoint", "data", "split", "attn_eps", "tokens", "heads", "feed_forward"}
    assert found["tokens"] == 2 * 32
    assert [(head["layer"], head["head"]) for head in found["heads"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for head in found["heads"]:
        assert set(head) == HEAD
        assert 1 <= head["sparsity_k"] <= 3
        assert head["row_sum"] == pytest.approx(head["sparsity_k"], abs=0.2), "rows that see less than k aside"
        assert head["row_sum_error"] < 1e-5
        assert 0 <= head["capped_share"] <= 1
        assert 1 <= head["effective_support"] <= 33
        assert 0 <= head["distance_back"] < 32
    for layer, unit in enumerate(found["feed_forward"]):
        assert set(unit) == {"layer", "units", "active_units", "dead_units"}
        assert (unit["layer"], unit["units"]) == (layer, 128)
        assert 0 <= unit["active_units"] <= 128


def test_epsilon_is_the_one_in_use(cda: Cda, tiny: Path, finished: Path, tmp_path: Path) -> None:
    """In the middle of annealing the weights are not those of attn_eps; validation takes the same ε as `cda eval`."""
    annealed = ("--set", "model.eps_anneal_start=4", "--set", "optim.schedule_steps=20", "--eps", 0.5)
    run = trained(cda, tiny, tmp_path / "run", *annealed, "--lr", 0.01, steps=2)
    eps = 4 ** (1 - 2 / 10) * 0.5 ** (2 / 10)
    assert inspected(cda, run)["attn_eps"] == pytest.approx(eps)
    assert f"ε = {eps:g}\n" in cda("inspect-sparsity", run).out
    [validation] = metrics(run, "validation")
    evaluated = json.loads(cda("eval", run, "--json", "--max-batches", 2, "--batch-size", 4).out)
    assert evaluated["loss"] == pytest.approx(validation["loss"], rel=1e-6)
    assert inspected(cda, finished)["attn_eps"] == 0.5
    softmax = trained(cda, tiny, tmp_path / "softmax", "--attention", "softmax")
    assert inspected(cda, softmax)["attn_eps"] is None


def test_the_table_has_all_columns_and_the_same_figures(cda: Cda, finished: Path) -> None:
    found, shown = inspected(cda, finished), cda("inspect-sparsity", finished, "--max-batches", 2)
    assert shown.code == 0
    assert shown.err == ""
    lines = shown.out.splitlines()
    [heading] = [line for line in lines if line.startswith("layer.head")]
    assert " ".join(heading.split()) == COLUMNS
    for head in found["heads"]:
        [row] = [line for line in lines if line.startswith(f"{head['layer']}.{head['head']} ")]
        assert row.split() == [
            f"{head['layer']}.{head['head']}",
            f"{head['sparsity_k']:.3f}",
            f"{head['row_sum']:.3f}",
            f"{head['row_sum_error']:.1e}",
            f"{head['effective_support']:.2f}",
            f"{head['attended_entries']:.2f}",
            f"{head['capped_share']:.1%}",
            f"{head['distance_back']:.1f}",
        ]


@pytest.mark.parametrize(
    ("options", "heads", "layers", "drawn"),
    [
        (["--layers", "1"], [(1, 0), (1, 1)], [1], "Layer 1, head 0"),
        (["--heads", "1"], [(0, 1), (1, 1)], [0, 1], "Layer 0, head 1"),
        (["--layers", "0-1", "--heads", "1,0"], [(0, 0), (0, 1), (1, 0), (1, 1)], [0, 1], "Layer 0, head 1"),
    ],
)
def test_layers_and_heads_are_chosen(
    cda: Cda, finished: Path, options: list[str], heads: list[tuple[int, int]], layers: list[int], drawn: str
) -> None:
    """Both the figures and the picture are of what was asked for."""
    found = inspected(cda, finished, *options)
    assert [(head["layer"], head["head"]) for head in found["heads"]] == heads
    assert [unit["layer"] for unit in found["feed_forward"]] == layers
    everything = {(head["layer"], head["head"]): head for head in inspected(cda, finished)["heads"]}
    assert found["heads"] == [everything[place] for place in heads]
    assert drawn in cda("inspect-sparsity", finished, *options, "--max-batches", 1).out


@pytest.mark.parametrize("option", ["--layers", "--heads"])
@pytest.mark.parametrize("value", ["2", "0,7", "1-0", "x", "", "-1", "0--1"])
def test_layers_that_are_not_there(cda: Cda, finished: Path, option: str, value: str) -> None:
    assert_refused(cda("inspect-sparsity", finished, f"{option}={value}"), option)


def test_the_picture_fits_and_draws_null_keys(cda: Cda, finished: Path) -> None:
    """A line that is wider than the screen breaks the picture; the null key comes before the first real one."""
    shown = cda("inspect-sparsity", finished, "--max-batches", 1).out
    picture = shown[shown.index("Layer 0, head 0") :].splitlines()[1:]
    assert max(map(len, shown.splitlines())) <= 100
    assert picture[0].split()[0] == "∅"
    rows = [line for line in picture[1:] if line.strip() and "λ:" not in line]
    assert len(rows) == 32, "a row is missing"
    for query, row in enumerate(rows):
        # A weight of 0 is a space, and no line ends in one.
        assert len(row) <= 9 + 2 * (query + 2), f"query {query} sees the null key and {query + 1} others"
        assert not row.endswith(" ")
    assert len(rows[0]) == 9 + 2 * 2
    assert "to 1" in picture[len(rows) + 1], "the legend is missing"


def test_softmax_is_inspected_too(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """The control of every comparison: its rows sum to 1."""
    run = trained(cda, tiny, tmp_path / "run", "--attention", "softmax", "--fixed-k")
    for head in inspected(cda, run)["heads"]:
        assert head["sparsity_k"] == 1
        assert head["row_sum"] == pytest.approx(1, abs=1e-6)
        assert head["effective_support"] > 1
    shown = cda("inspect-sparsity", run, "--max-batches", 1).out
    assert "Attention: softmax\nlayer.head  effective support  λ > 1e-3  distance back\n" in shown, "k means nothing"
    assert "PyTorch SDPA" in cda("train", "--out", run, "--steps", 2, "--dry-run").out


def test_a_sparse_feed_forward_is_inspected_too(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """With k = 4 of 128 units, few carry the sum."""
    sparse = ("--ff", "coordinate-descent", "--ff-k", 4, "--eps", 0.01)
    found = inspected(cda, trained(cda, tiny, tmp_path / "run", *sparse))
    dense = inspected(cda, trained(cda, tiny, tmp_path / "dense"))
    for unit, other in zip(found["feed_forward"], dense["feed_forward"], strict=True):
        assert 4 <= unit["active_units"] < other["active_units"]


def test_k_beyond_every_row(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """No row can be short of its k then: no share of capped entries, and no division by nothing."""
    run = trained(cda, tiny, tmp_path / "run", "--attn-k", 40, "--fixed-k")
    for head in inspected(cda, run)["heads"]:
        assert head["capped_share"] == 0
        assert head["row_sum_error"] < 1e-5


def test_another_text(cda: Cda, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Λ and λ: " * 200, encoding="utf-8")
    assert inspected(cda, finished, "--data", other)["data"] == str(other)
