"""`cda_cli.inspect`: a report as tables, rows and checks, which agree with each other."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow
import pytest

import cda_cli
from cda_cli.errors import CheckFailedError, CheckpointError, ConfigError, StorageError
from cda_cli.inspection import NAMES
from cda_cli.inspection.notebook import report_html
from cda_cli.language_model import LanguageModel
from cda_cli.sparsity_report import SparsityReport
from tests.small_models import random_model

TEXT = "The weights sum to k; none exceeds 1, and λ > 0."  # 49 bytes: two windows of 24 and a third that reaches back
PLACES = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return random_model()


@pytest.fixture(scope="module")
def report(lm: LanguageModel) -> SparsityReport:
    return cda_cli.inspect(lm, TEXT, budget="100kB")


def test_all_tokens_of_the_text_are_inputs(lm: LanguageModel, report: SparsityReport) -> None:
    assert (report.measures.tokens, report.measures.windows) == (3 * 24, 3)
    assert "".join(report.tokens) == TEXT[:24]
    whole = cda_cli.inspect(lm, TEXT[:24], budget="100kB")
    short = cda_cli.inspect(lm, TEXT[:24], context=12, budget="100kB").measures
    assert (short.tokens, short.windows) == (24, 2)
    assert (whole.measures.tokens, whole.measures.windows) == (24, 1)
    assert repr(whole) == "<SparsityReport of random: 4 heads, 24 tokens in 1 window>"
    for layer, head in PLACES:
        assert whole.row(layer, head, 23).keys.tolist() == report.row(layer, head, 23).keys.tolist()


def test_tables_have_the_figures(report: SparsityReport) -> None:
    heads = report.heads.numpy()
    assert list(zip(heads["layer"], heads["head"], strict=True)) == PLACES
    for name in NAMES:
        np.testing.assert_array_equal(heads[name], [head.measures[name] for head in report.measures.heads])
    assert heads["keys_95_p95"].tolist() == [head.quantiles["keys_95"]["p95"] for head in report.measures.heads]
    assert report.units.numpy()["units_99"].tolist() == [each.units.units_99 for each in report.measures.layers]
    assert report.layers.numpy()["layer"].tolist() == [0, 1]
    document = report.as_dict()
    assert document["heads"][3]["sink_mass"] == heads["sink_mass"][3]
    assert document["model"] == "random"


def test_tables_of_rows_agree_with_single_rows(report: SparsityReport) -> None:
    rows, weights = report.rows.numpy(), report.weights.numpy()
    assert len(report.rows) == len(rows["query"]) == 4 * 24
    for layer, head in PLACES:
        for query in (0, 7, 23):
            row = report.row(layer, head, query)
            (of_row,) = np.flatnonzero((rows["layer"] == layer) & (rows["head"] == head) & (rows["query"] == query))
            assert rows["kept_keys"][of_row] == len(row.keys)
            assert rows["capped_keys"][of_row] == row.capped.sum()
            assert (rows["sparsity_k"][of_row], rows["rest"][of_row]) == (row.sparsity_k, row.rest)
            of_keys = (weights["layer"] == layer) & (weights["head"] == head) & (weights["query"] == query)
            by_key = dict(zip(weights["key"][of_keys], weights["weight"][of_keys], strict=True))
            assert by_key == pytest.approx(dict(zip(row.keys, row.weights, strict=True)))
            assert min(by_key) >= -1, "one null key stands before the text"


def test_others_read_the_tables_as_arrow(report: SparsityReport) -> None:
    for table in (report.heads, report.layers, report.units, report.rows, report.weights):
        read = pyarrow.table(table)
        assert read.column_names == table.columns
        assert read.num_rows == len(table)
        for name, column in table.numpy().items():
            np.testing.assert_array_equal(read.column(name).to_numpy(), column)
    frame = report.weights.pandas()
    assert list(frame.columns) == report.weights.columns
    assert repr(report.units).startswith("<Table of 2 rows: layer, units, ")


@pytest.mark.parametrize(
    ("settings", "eps"),
    [
        (("model.attn_eps=0.5", "model.attn_k=3"), 0.5),
        (("model.attn_eps=0.25", "model.eps_anneal_start=4", "model.kv_heads=1"), 2.0),
    ],
)
def test_a_row_can_be_computed_with_another_k_and_epsilon(settings: tuple[str, ...], eps: float) -> None:
    """From 8 bits, to 0.03 of a weight, also in the middle of annealing."""
    lm = random_model(*settings)
    lm.model.set_attention_eps(eps)
    report = cda_cli.inspect(lm, TEXT, budget="100kB")
    for query in (0, 11, 23):
        row, weights = report.row(1, 0, query), report.row_with(1, 0, query)
        np.testing.assert_allclose(weights[row.keys + 1], row.weights, atol=0.03)
        assert len(weights) == query + 2
    sharp, wide = report.row_with(1, 0, 23, eps=0.05), report.row_with(1, 0, 23, k=4)
    assert (sharp.sum(), wide.sum()) == pytest.approx((row.sparsity_k, 4), rel=1e-3)
    assert (sharp > 0.01).sum() < (weights > 0.01).sum()
    with pytest.raises(ConfigError, match="eps"):
        report.row_with(1, 0, 3, eps=0.0)
    with pytest.raises(ConfigError, match="no query 24"):
        report.row_with(1, 0, 24)
    with pytest.raises(ConfigError, match="only rows of a run with coordinate-descent"):
        cda_cli.inspect(random_model("model.attention=hard-topk"), TEXT, budget="100kB").row_with(0, 0, 3, k=2)
    with pytest.raises(ConfigError, match="and the exact solver"):
        cda_cli.inspect(random_model("model.solver=iterative"), TEXT, budget="100kB").row_with(0, 0, 3, k=2)


def test_causal_checks_are_part_of_it(lm: LanguageModel, report: SparsityReport, tmp_path: Path) -> None:
    """In the document, in checks, in the verdict, as a figure and on the page; and the gradients of each head."""
    checked = cda_cli.inspect(lm, TEXT, causal=True, budget="100kB")
    assert checked.as_dict()["heads"][0]["keys_95"] == report.as_dict()["heads"][0]["keys_95"]
    checked.check("causal.top[16].difference < 1")
    assert (checked.heads.numpy()["importance"] > 0).all()
    assert "importance" not in report.diff(checked).columns
    assert checked.effects is not None
    assert checked.verdict[: len(checked.effects.verdict())] == checked.effects.verdict() != []
    assert checked.plot("loss-against-keys").axes
    checked.save(tmp_path / "report.html")
    assert '"top[16]"' in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match="causal checks take a run"):
        cda_cli.inspect(lm.model, TEXT, causal=True)


def test_it_is_saved_as_one_page(report: SparsityReport, tmp_path: Path) -> None:
    report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    document = json.loads(re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[0])
    assert document["labels"] == list(TEXT[:24])
    assert len(document["live"]) == 4
    assert document["eps"] == report.examined.eps
    for layer, head in PLACES:
        stream = base64.b64encode(report.store.heads[layer, head].rows).decode()
        assert f'id="rows-{layer}.{head}">{stream}<' in page
    with pytest.raises(StorageError):
        report.save(tmp_path / "report.html" / "below.html")


@pytest.mark.parametrize("name", ["heads", "positions", "distances", "units", "head-map"])
def test_its_figures_are_drawn(report: SparsityReport, name: str) -> None:
    figure = report.plot(name, layer=1, style="slides")
    assert figure.axes
    assert figure.get_figwidth() > 1


def test_a_map_shows_the_kept_weights(report: SparsityReport) -> None:
    """In the colours of the figures, a larger weight is brighter."""
    (axes, *_) = report.plot("head-map", layer=1, head=1).axes
    image = np.asarray(axes.images[0].get_array())
    pixels = len(image) // 24
    brightness = image[pixels // 2 :: pixels, pixels // 2 :: pixels, :3].astype(int).sum(-1)
    assert brightness.shape == (24, 25)
    row = report.row(1, 1, 23)
    shown = brightness[23, row.keys + 1]
    assert list(shown[np.argsort(row.weights)]) == sorted(shown)
    assert shown.max() > np.delete(brightness[23], row.keys + 1).max(initial=0)


def test_what_cannot_be_drawn_is_one_sentence(report: SparsityReport) -> None:
    with pytest.raises(ConfigError, match="the figure ablation has nothing to show here; --ablate heads measures it"):
        report.plot("ablation")
    with pytest.raises(ConfigError, match="no figure 'head'"):
        report.plot("head")
    with pytest.raises(ConfigError, match="no style 'papers'"):
        report.plot("heads", style="papers")
    with pytest.raises(ConfigError, match=r"no head 7\.0"):
        report.plot("head-map", layer=7)


def test_a_check_passes_or_says_the_figure(report: SparsityReport) -> None:
    report.check("support.p95 < 64")
    report.check("head[1.0].keys_95 >= keys_95.min")
    with pytest.raises(CheckFailedError, match=r"^support\.p95 < 1 does not hold: support\.p95 is \d"):
        report.check("support.p95 < 1")
    with pytest.raises(ConfigError, match="did you mean"):
        report.check("suport.p95 < 64")


def test_what_differs_between_two_models(report: SparsityReport) -> None:
    other = cda_cli.inspect(random_model(seed=1), TEXT, budget="100kB")
    differences, left, right = (each.numpy() for each in (report.diff(other), report.heads, other.heads))
    np.testing.assert_allclose(differences["effective_support"], right["effective_support"] - left["effective_support"])
    assert differences["head"].tolist() == [0, 1, 0, 1]
    assert not any(np.nan_to_num(column).any() for name, column in report.diff(report).numpy().items() if "_" in name)
    with pytest.raises(ConfigError, match="other layers and heads"):
        report.diff(cda_cli.inspect(random_model("model.depth=1"), TEXT, budget="100kB"))
    with pytest.raises(ConfigError, match="two texts"):
        report.diff(cda_cli.inspect(random_model(), TEXT + "!", budget="100kB"))


def test_what_cannot_be_inspected_is_one_sentence(lm: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="budget"):
        cda_cli.inspect(lm, TEXT, budget="1kB")
    with pytest.raises(ConfigError, match="no size"):
        cda_cli.inspect(lm, TEXT, budget="much")
    with pytest.raises(ConfigError, match="the text is empty; give one token at least"):
        cda_cli.inspect(lm, "")
    with pytest.raises(CheckpointError):
        cda_cli.inspect("there/is/none", TEXT)


class Elements(HTMLParser):
    """Which elements and attributes are there, and that each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_a_notebook_shows_it_without_scripts_and_styles(report: SparsityReport) -> None:
    html = report._repr_html_()
    read = Elements()
    read.feed(html)
    assert not read.open
    assert read.names == {"div", "p", "b", "svg", "g", "path", "table", "thead", "tbody", "tr", "th", "td"}
    assert all(sentence in read.text for sentence in report.verdict)
    assert not read.attributes & {"style", "class", "id", "href", "src"}
    for head in report.measures.heads:
        assert f"{head.layer}.{head.head}" in read.text
        assert f"{head.measures['effective_support']:.2f}" in read.text


def test_caps_are_left_out_where_rows_have_no_budget(tmp_path: Path) -> None:
    report = cda_cli.inspect(random_model("model.attention=softmax"), TEXT, budget="100kB")
    assert not re.search("capped|gated", report._repr_html_())
    report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    document = json.loads(re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.DOTALL)[0])
    assert not {"capped_share", "gate_equivalent"} & set(document["meanings"])


def test_a_large_model_takes_less_than_200_kb(report: SparsityReport) -> None:
    """128 layers of 128 heads: the table has a row for each layer, and the map all heads."""
    (one, *_), figures = report.measures.heads, report.measures
    heads = [
        type(one)(layer, head, {**one.measures, "effective_support": 1.0 + layer * head}, {}, {}, [])
        for layer in range(128)
        for head in range(128)
    ]
    html = report_html(
        type(figures)(heads, figures.layers, figures.tokens, figures.windows), "<b>name</b>", ["It is."], True
    )
    assert len(html.encode()) < 200_000
    assert len(re.findall(r"M\d+ \d+h", html)) == 128 * 128
    assert html.count("<tr>") == 129
    assert "&lt;b&gt;name&lt;/b&gt;" in html
