"""`cda inspect-sparsity`: figures of each layer and head, and a picture of one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cda_cli.causal import Examination, Wanted
from cda_cli.inspection import MEASURES, NAMES, ReportWatcher
from cda_cli.restore import open_side, restore_on
from cda_cli.signals import StopRequest
from tests.commands.helpers import Cda, assert_refused, metrics

COLUMNS = "head k support keys 95% capped/k gated sink distance reads"


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
    source = {"checkpoint", "data", "split", "attn_eps"}
    assert set(found) == source | {"tokens", "windows", "ranges", "all_heads", "heads", "layers", "feed_forward"}
    assert found["tokens"] == 2 * 32
    assert [(head["layer"], head["head"]) for head in found["heads"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for head in found["heads"]:
        assert set(head) == {"name", "layer", "head", *NAMES, "quantiles", "by_position", "distance_mass"}
        assert set(head["by_position"]) == set(MEASURES)
        assert 1 <= head["sparsity_k"] <= 3
        assert head["row_sum"] == pytest.approx(head["sparsity_k"], abs=0.2), "rows that see less than k aside"
        assert head["row_sum_error"] < 1e-5
        assert 0 <= head["capped_share"] <= 1
        assert 1 <= head["effective_support"] <= 33
        assert 0 <= head["distance_back"] < 32
    for layer, unit in enumerate(found["feed_forward"]):
        assert (unit["layer"], unit["units"]) == (layer, 128)
        assert 1 <= unit["units_99"] <= unit["units_99_p95"] <= 128


def test_the_page_on_inspection_names_every_field(cda: Cda, finished: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "inspection.md").read_text(encoding="utf-8")
    found = inspected(cda, finished)
    fields = {*found["heads"][0], *found["layers"][0], *found["feed_forward"][0], *found}
    documented = set(re.findall(r"`(\w+)`", page))
    assert fields <= documented, f"docs/inspection.md does not explain {sorted(fields - documented)}"


def test_causal_checks_are_part_of_the_report(cda: Cda, finished: Path) -> None:
    """As `cda eval` has them on the same windows: in the document, the verdict and the chart.

    A window has 32 tokens, so cuts end at 16 keys: 32 would leave out none.
    """
    short = ("--max-batches", 4)
    found = json.loads(cda("inspect-sparsity", finished, "--causal", *short, "--json").out)["causal"]
    asked = [
        option for name in ("top", "recent", "distance-matched", "random") for option in ("--cut", f"{name}:1..16")
    ]
    evaluated = json.loads(
        cda("eval", finished, *asked, "--as", "gate", "--tolerance", 0.01, *short, "--batch-size", 1, "--json").out
    )
    for name in ("loss", "cuts", "substitutes", "held_out", "windows"):
        assert found[name] == evaluated[name], name
    shown = cda("inspect-sparsity", finished, "--causal", *short)
    assert (shown.code, shown.err) == (0, "")
    assert "rows that see more than k keys are a softmax times a gate k; to make all of them so costs " in shown.out
    chart = shown.out[shown.out.index("Loss against keys kept") : shown.out.index("Attention computed")].splitlines()
    assert max(map(len, chart)) <= 80
    for cut in found["cuts"]:
        assert f"{cut['difference']:+.4f} ± {cut['difference_error']:.4f}" in "\n".join(chart)


def test_the_progress_ends_where_the_work_does(finished: Path) -> None:
    """Each pass over the windows is counted before it begins."""
    restored, dtype = restore_on(finished, "cpu", "float32", "auto")
    with StopRequest() as stop:
        text = open_side(restored, None, None, stop, False)
    wanted = Wanted.of_selection(restored.model)._replace(head_orders=["random"])
    for examination in (Examination(False, Wanted([], [])), Examination(True, wanted)):
        done: list[int] = []
        examination.run(restored, dtype, ReportWatcher(), lambda: text.batches(1, 2)[0], done.append)
        assert sum(done) == 2 * examination.passes(restored.config.model)


def test_importance_by_gradient_is_a_measure_where_it_is_asked_for(cda: Cda, finished: Path) -> None:
    """The same as `cda eval --ablate` puts beside the cost of a head, and in the map."""
    plain, found = inspected(cda, finished), inspected(cda, finished, "--by", "importance")
    assert "importance" not in plain["heads"][0]
    evaluated = json.loads(
        cda("eval", finished, "--ablate", "heads", "--max-batches", 2, "--batch-size", 1, "--json").out
    )
    expected = [each["gradient"] for each in evaluated["ablations"]]
    assert [head["importance"] for head in found["heads"]] == pytest.approx(expected)
    assert found["all_heads"]["importance"]["max"] == pytest.approx(max(expected))
    assert all(head["sparsity_k_gradient"] for head in found["heads"])
    shown = cda("inspect-sparsity", finished, "--max-batches", 2, "--by", "importance").out
    grid = shown[shown.index("importance: layers down") :].splitlines()[2:4]
    numbers = [float(re.sub("[^0-9.]", "", word)) for line in grid for word in line.split()[1:]]
    assert numbers == pytest.approx(expected, abs=0.006)


def test_heads_are_ablated_without_causal_checks(cda: Cda, finished: Path) -> None:
    """Without cuts there is no curve, and without the gate control the verdict says of the budget what is measured."""
    shown = cda("inspect-sparsity", finished, "--max-batches", 1, "--ablate", "heads")
    assert (shown.code, shown.err) == (0, "")
    assert re.findall(r"^without head (\d\.\d) ", shown.out, re.MULTILINE) == ["0.0", "0.1", "1.0", "1.1"]
    assert "of the rows that see more than k keys cap none" in " ".join(shown.out.split())


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
    [heading] = [line for line in lines if line.startswith("head ")]
    assert " ".join(heading.split()) == COLUMNS
    for head in found["heads"]:
        [row] = [line for line in lines if line.startswith(f"{head['layer']}.{head['head']} ")]
        assert row.split()[:-1] == [
            f"{head['layer']}.{head['head']}",
            f"{head['sparsity_k']:.3f}",
            f"{head['effective_support']:.2f}",
            f"{head['keys_95']:.1f}",
            f"{head['capped_share']:.1%}",
            f"{head['gate_equivalent']:.1%}",
            f"{head['sink_mass']:.1%}",
            f"{head['median_distance']:.0f}",
        ]
        assert len(row) <= 80
    tables = shown.out[: shown.out.index("Layer 0, head 0")].splitlines()
    assert max(map(len, tables[8:])) <= 80, "a table or the map is wider than 80 columns"


def test_a_map_of_all_heads_by_any_measure(cda: Cda, finished: Path) -> None:
    found = inspected(cda, finished)
    for name in ("effective_support", "rest_4"):
        options = [] if name == "effective_support" else ["--by", name]
        shown = cda("inspect-sparsity", finished, "--max-batches", 2, *options).out
        lines = shown[shown.index(f"{name}: layers down, heads across") :].splitlines()
        assert lines[1].split() == ["layer", "0", "1"]
        for layer, line in enumerate(lines[2:4]):
            numbers = [float(re.sub("[^0-9.]", "", word)) for word in line.split()]
            expected = [head[name] for head in found["heads"] if head["layer"] == layer]
            assert numbers == [layer, *(pytest.approx(figure, abs=0.006, rel=0.06) for figure in expected)]
    assert_refused(cda("inspect-sparsity", finished, "--by", "effective_suport"), "did you mean 'effective_support'?")


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
    assert [layer["layer"] for layer in found["layers"]] == layers
    everything = {(head["layer"], head["head"]): head for head in inspected(cda, finished)["heads"]}
    assert found["heads"] == [everything[place] for place in heads]
    assert drawn in cda("inspect-sparsity", finished, *options, "--max-batches", 1).out


@pytest.mark.parametrize("option", ["--layers", "--heads"])
@pytest.mark.parametrize("value", ["2", "x"])
def test_layers_that_are_not_there(cda: Cda, finished: Path, option: str, value: str) -> None:
    assert_refused(cda("inspect-sparsity", finished, f"{option}={value}"), option)


def test_the_picture_fits_and_draws_null_keys(cda: Cda, finished: Path) -> None:
    """A line that is wider than the screen breaks the picture; the null key comes before the first real one."""
    shown = cda("inspect-sparsity", finished, "--max-batches", 1).out
    picture = shown[shown.index("Layer 0, head 0") :].splitlines()[1:]
    assert max(map(len, picture)) <= 100
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
    for head in inspected(cda, run, "--by", "importance")["heads"]:
        assert head["importance"] > 0
        assert head["sparsity_k_gradient"] is None, "there is no budget to change"
        assert head["sparsity_k"] == 1
        assert head["row_sum"] == pytest.approx(1, abs=1e-6)
        assert head["effective_support"] > 1
    shown = cda("inspect-sparsity", run, "--max-batches", 1).out
    assert re.search(r"Attention: softmax\nhead +support +keys 95% +sink +distance +reads\n", shown), "k means nothing"
    assert "PyTorch SDPA" in cda("train", "--out", run, "--steps", 2, "--dry-run").out


def test_a_sparse_feed_forward_is_inspected_too(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """With one of 8 blocks of 16 units on each token, few carry the sum."""
    run = trained(
        cda, tiny, tmp_path / "run", "--ff", "hard-topk-blocks", "--ff-k", 1, "--set", "model.ff_block_size=16"
    )
    found, dense = inspected(cda, run), inspected(cda, trained(cda, tiny, tmp_path / "dense"))
    for unit, other in zip(found["feed_forward"], dense["feed_forward"], strict=True):
        assert 1 <= unit["units_99"] <= unit["nonzero_units"] <= 16 < other["units_99"]
        assert (unit["blocks"], unit["active_blocks"]) == (8, 1)
        assert (other["blocks"], other["active_blocks"]) == (0, 0)
    shown = cda("inspect-sparsity", run, "--max-batches", 1).out
    assert re.search(r"blocks of units\nlayer +blocks +active +dead\n0 +8 +1\.0 +\d\n", shown)


def test_k_beyond_every_row(cda: Cda, tiny: Path, tmp_path: Path) -> None:
    """No row can be short of its k then: no share of capped entries, and no division by nothing."""
    run = trained(cda, tiny, tmp_path / "run", "--attn-k", 40, "--fixed-k")
    for head in inspected(cda, run)["heads"]:
        assert head["capped_share"] is None
        assert head["row_sum_error"] < 1e-5


def test_another_text(cda: Cda, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Λ and λ: " * 200, encoding="utf-8")
    found = inspected(cda, finished, "--data", other, "--context", 80)
    assert (found["data"], found["tokens"], found["windows"]) == (str(other), 2 * 80, 2)


@pytest.mark.parametrize(
    ("condition", "code", "said"),
    [
        ("support.p95 > 1000", 0, ""),
        ("support.p95 > 1", 3, "failed, as support.p95 > 1: support.p95 is "),
        ("head[1.0].keys_95 >= all_heads.keys_95.min", 3, "head[1.0].keys_95 is "),
        ("suport.p95 > 64", 2, "did you mean 'support.p95'?"),
        ("support.p95", 2, "no condition"),
    ],
)
def test_a_figure_fails_the_command(cda: Cda, finished: Path, condition: str, code: int, said: str) -> None:
    """After the result is shown, and with the same words each time."""
    arguments = ("inspect-sparsity", finished, "--max-batches", 1, "--json", "--fail-if", condition)
    result = cda(*arguments)
    assert result.code == code
    assert said in result.err
    assert bool(result.out) == (said != "no condition")
