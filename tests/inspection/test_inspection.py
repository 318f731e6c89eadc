"""The report says what the model selects, and making it leaves the model unchanged."""

from __future__ import annotations

import math
import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cda_cli.conditions import metrics_of
from cda_cli.config import ModelConfig
from cda_cli.data import Batch, Tokens, evaluation_batches
from cda_cli.errors import ConfigError
from cda_cli.evaluation import Sums, joined, measure
from cda_cli.evaluation.details import Calibration, Detail
from cda_cli.inspection import (
    NAMES,
    HeadReport,
    RecordWatcher,
    ReportWatcher,
    RowCollector,
    effective_support,
    gradients,
    inspect,
    named_metrics,
    parse_selection,
)
from cda_cli.inspection.units import contributions, units_in_use
from cda_cli.model import Transformer
from cda_cli.model.observe import ObservedAttention, ObservedFeedForward, observing

CPU = torch.device("cpu")


def build(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "seq_len": 12, "dim": 16, "depth": 2, "heads": 2, "ff_mult": 2.0}
    operator = {"attn_k": 2.0, "attn_eps": 0.1, "ff_k": 3.0, "learned_k_bias": 0.0}
    return Transformer(ModelConfig(**sizes | operator | changes)).eval()


def batches(batch_size: int = 3) -> list[Batch]:
    ids = np.random.default_rng(0).integers(0, 31, 12 * 7 + 1, dtype=np.uint16)
    return list(evaluation_batches(Tokens(ids, np.ones_like(ids), len(ids)), 12, batch_size))


def run(model: Transformer, text: list[Batch] | None = None, **changes: Any) -> ReportWatcher:
    watcher = ReportWatcher(model.config.attn_k, changes.pop("keep", None))
    inspect(model, text or batches(), CPU, torch.float32, watcher, **changes)
    return watcher


def flat(value: Any, path: str = "") -> dict[str, float]:
    """The numbers in a document of JSON, by where they stand."""
    if not isinstance(value, (dict, list)):
        return {} if isinstance(value, str) else {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {name: number for key, inner in items for name, number in flat(inner, f"{path}/{key}").items()}


def same(one: HeadReport, other: HeadReport) -> bool:
    """Whether all figures are the same, up to rounding, which may move a quantile by a step of its histogram."""
    left, right = flat(one.as_dict()), flat(other.as_dict())
    steps = [name for name in left if name.startswith("/quantiles")]
    return {name: left.pop(name) for name in steps} == pytest.approx(
        {name: right.pop(name) for name in steps}, rel=0.02
    ) and left == pytest.approx(right, rel=1e-5, abs=1e-5, nan_ok=True)


def raw(model: Transformer) -> list[ObservedAttention | ObservedFeedForward]:
    """Returns what an observer gets in one pass over the whole text."""
    seen: list[ObservedAttention | ObservedFeedForward] = []
    with torch.no_grad(), observing(model, seen.append):
        model(torch.cat([batch.inputs for batch in batches()]))
    return seen


def at_most_visible(k: Tensor, null: int = 0) -> Tensor:
    return k.minimum(torch.arange(1, k.shape[-1] + 1) + float(null))


@pytest.mark.parametrize("null_kv", [0, 1])
@pytest.mark.parametrize("learned_k", [False, True])
@pytest.mark.parametrize("attention", ["softmax", "coordinate-descent"])
def test_rows_sum_to_k_or_to_1(attention: str, learned_k: bool, null_kv: int) -> None:
    """A learned k differs from row to row. No row sums to more than the number of keys that it sees."""
    model = build(attention=attention, learned_k=learned_k, null_kv=null_kv)
    report = run(model).report()
    assert [(head.layer, head.head) for head in report.heads] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert report.tokens == 7 * 12
    seen = [one for one in raw(model) if isinstance(one, ObservedAttention)]
    for head in report.heads:
        k = seen[head.layer].sparsity_k[:, head.head]
        found = head.measures
        assert found["sparsity_k"] == pytest.approx(k.mean().item(), rel=1e-5)
        assert found["sparsity_k_variance"] == pytest.approx(k.double().var(unbiased=False).item(), rel=1e-4, abs=1e-12)
        assert found["row_sum"] == pytest.approx(at_most_visible(k, null_kv).mean().item(), rel=1e-5)
        assert found["row_sum_error"] < 1e-5
        if attention == "softmax":
            assert found["sparsity_k"] == 1
            assert found["row_sum"] == pytest.approx(1)
            assert (found["share_at_smallest_k"], found["share_at_largest_k"]) == (1, 0)
        elif not learned_k:
            assert found["sparsity_k"] == 2
            assert (found["share_at_smallest_k"], found["share_at_largest_k"]) == (0, 1)


def test_an_iteration_that_stops_early_shows_in_the_row_sums() -> None:
    report = run(build(solver="iterative", n_iters=1)).report()
    assert max(head.measures["row_sum_error"] for head in report.heads) > 1e-2


@pytest.mark.parametrize("attention", ["softmax", "coordinate-descent"])
def test_the_measures_are_the_means_over_the_text(attention: str) -> None:
    model = build(attention=attention)
    report = run(model).report()
    position = torch.arange(12)
    back = (position[:, None] - position).clamp(min=0)
    for one in raw(model):
        if isinstance(one, ObservedFeedForward):
            unit = report.layers[one.layer].units
            used = units_in_use(
                contributions(one.activations, model.each_block()[one.layer].feed_forward.proj_out.weight)
            )
            assert unit.units == 32
            assert unit.units_99 == pytest.approx(used.sum(-1).double().mean().item())
            assert unit.dead_units == int((~used.flatten(0, 1).any(0)).sum())
            continue
        for head in (head for head in report.heads if head.layer == one.layer):
            weights, k = one.weights[:, head.head].double(), one.sparsity_k[:, head.head]
            bounded = position + 1 > k[0]
            capped = ((weights >= 1 - 1e-6).sum(-1) / k)[:, bounded]
            support, found = effective_support(weights), head.measures
            middle = support.quantile(0.5, interpolation="lower").item()
            assert found["effective_support"] == pytest.approx(support.mean().item(), rel=1e-5)
            assert head.by_position["effective_support"][4] == pytest.approx(support[:, 8:].mean().item(), rel=1e-5)
            assert head.quantiles["effective_support"]["p50"] == pytest.approx(middle, rel=0.006)
            assert found["capped_share"] == pytest.approx(capped.mean().item())
            assert found["distance_back"] == pytest.approx(
                ((weights * back).sum(-1) / weights.sum(-1)).mean().item(), rel=1e-5
            )
            assert sum(head.distance_mass) == pytest.approx(1)


def test_a_head_that_must_cap_everything_has_no_share() -> None:
    """k covers the whole context, so no row is bounded, and 0 is not divided by 0."""
    for head in run(build(attn_k=99.0)).report().heads:
        assert math.isnan(head.measures["capped_share"])
        assert head.measures["row_sum"] == pytest.approx(6.5)
        assert head.measures["effective_support"] == pytest.approx(6.5)


def test_the_batch_size_does_not_show() -> None:
    model = build(learned_k=True, ff="coordinate-descent")
    one, other = (run(model, text=batches(size)).report() for size in (1, 7))
    assert all(map(same, one.heads, other.heads))
    for left, right in zip(one.layers, other.layers, strict=True):
        assert left.units == pytest.approx(right.units, rel=1e-5)
        assert left.residual[2:] == pytest.approx(right.residual[2:], rel=1e-5)


def test_dead_units_are_found() -> None:
    model = build()
    with torch.no_grad():
        model.each_block()[1].feed_forward.proj_in.weight[:5] = 0
        model.each_block()[1].feed_forward.proj_in.bias[:5] = 0
    first, second = run(model).report().layers
    assert (first.units.dead_units, second.units.dead_units) == (0, 5)
    assert second.units.units_99 <= 27


def test_the_kept_weights_are_those_of_the_first_window() -> None:
    model = build(null_kv=1)
    seen = [one for one in raw(model) if isinstance(one, ObservedAttention)]
    kept = run(model, keep=(1, 0)).kept
    assert kept is not None
    torch.testing.assert_close(kept, seen[1].weights[0, 0], atol=1e-5, rtol=0)
    assert run(model).kept is None


def test_of_a_long_window_the_first_weights_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them would be the square of the window."""
    model = build(null_kv=1)
    seen = [one for one in raw(model) if isinstance(one, ObservedAttention)]
    monkeypatch.setattr("cda_cli.inspection.watchers.MOST_DRAWN", 7)
    monkeypatch.setattr("cda_cli.model.rules.base.BLOCK_SCORES", 7 * 2 * 13 * 5)
    kept = run(model, keep=(1, 0)).kept
    assert kept is not None
    torch.testing.assert_close(kept, seen[1].weights[0, 0, :7, :8], atol=1e-5, rtol=0)


def test_the_store_has_the_rows_of_the_first_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all layers and heads, from whatever blocks; the windows of later batches are no part of it."""
    model = build(null_kv=1, learned_k=True)
    weights = [one.weights[0] for one in raw(model) if isinstance(one, ObservedAttention)]
    monkeypatch.setattr("cda_cli.model.rules.base.BLOCK_SCORES", 2 * 13 * 5)
    collector = RowCollector(2, 100_000, keep=1.0)
    inspect(model, batches(1), CPU, torch.float32, ReportWatcher(collector=collector))
    store = collector.store()
    assert list(store.heads) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for layer, head in store.heads:
        for query in range(12):
            row = store.row(layer, head, query)
            exact = weights[layer][head, query, torch.from_numpy(row.keys + 1)].numpy()
            np.testing.assert_allclose(row.weights, exact, rtol=0.014)
            assert row.weights.sum() + row.rest == pytest.approx(weights[layer][head, query].sum().item(), rel=0.02)


@pytest.mark.parametrize("at_a_time", [1, 7 * 2 * 13 * 5])
@pytest.mark.parametrize("attention", ["softmax", "coordinate-descent"])
def test_a_long_sequence_is_watched_in_parts(monkeypatch: pytest.MonkeyPatch, attention: str, at_a_time: int) -> None:
    """One row at a time, or 5 of a batch: the same measures, weights and logits, and never all weights at once."""
    model = build(attention=attention, learned_k=True, null_kv=1)
    whole, together = run(model, keep=(1, 1)), raw(model)
    monkeypatch.setattr("cda_cli.model.rules.base.BLOCK_SCORES", at_a_time)
    found, parts = run(model, keep=(1, 1)), raw(model)
    assert len(parts) > len(together)
    assert max(one.weights.numel() for one in parts if isinstance(one, ObservedAttention)) <= max(at_a_time, 7 * 2 * 13)
    assert found.kept is not None
    assert whole.kept is not None
    torch.testing.assert_close(found.kept, whole.kept, atol=1e-6, rtol=0)
    assert all(map(same, found.report().heads, whole.report().heads))
    for part, all_rows in zip(found.report().layers, whole.report().layers, strict=True):
        assert part.units == pytest.approx(all_rows.units)


@pytest.mark.parametrize("tied_embeddings", [True, False])
def test_there_are_never_the_logits_of_a_whole_window(monkeypatch: pytest.MonkeyPatch, tied_embeddings: bool) -> None:
    """They would be the window times the vocabulary. Losses, gradients and calibration take a part at a time."""
    model = build(learned_k=True, tied_embeddings=tied_embeddings)
    sizes: list[int] = []
    whole = gradients(model, batches(), CPU, torch.float32)

    def sums(*details: Detail) -> Sums:
        return joined(measure(model, batches(), CPU, torch.float32, details=details))[0]

    losses, calibrated = sums(), sums(Calibration())
    monkeypatch.setattr("cda_cli.model.loss.PIECE", 3 * 31 * 5)
    monkeypatch.setitem(gradients.__globals__, "TOKENS", 2 * 12)  # the module is hidden by the function
    with model.to_logits.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.numel())):
        run(model)
        found = gradients(model, batches(), CPU, torch.float32)
        torch.testing.assert_close(sums().nats, losses.nats)
        torch.testing.assert_close(sums(Calibration()).nats, losses.nats)
        torch.testing.assert_close(sums(Calibration()).details, calibrated.details)
    assert max(sizes) == 3 * 31 * 5
    for part, expected in zip(found, whole, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-4)
    assert not model.activation_checkpointing


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    """Its mode and its observers are restored, also after an error. Dropout is off meanwhile."""
    model = build(dropout=0.5).train(training)
    heard: list[int] = []
    assert all(map(same, run(model, advance=heard.append).report().heads, run(build()).report().heads))
    assert heard == [3, 3, 1]
    beyond = Batch(*(torch.zeros(1, 13, dtype=torch.int64) for _ in range(2)), torch.zeros(1))
    with pytest.raises(ValueError, match="exceed the context"):
        run(model, text=[beyond])
    assert all(module.training is training for module in model.modules())
    assert all(block.attention.observer is block.feed_forward.observer is None for block in model.each_block())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_only_some_layers_and_heads() -> None:
    report = run(build(depth=3, heads=4)).report()
    part = report.only([0, 2], [1, 3])
    assert [(head.layer, head.head) for head in part.heads] == [(0, 1), (0, 3), (2, 1), (2, 3)]
    assert [layer.layer for layer in part.layers] == [0, 2]
    assert part.tokens == report.tokens
    assert all(head in report.heads for head in part.heads)


def test_the_report_for_machines_holds_everything() -> None:
    report = run(build(depth=1)).report()
    document = report.as_dict()
    assert (document["tokens"], document["windows"]) == (84, 7)
    assert document["ranges"] == [[0, 0], [1, 1], [2, 3], [4, 7], [8, 15]]
    for found, head in zip(document["heads"], report.heads, strict=True):
        assert set(head.measures) == set(NAMES)
        assert set(found) == {"name", "layer", "head", *NAMES, "quantiles", "by_position", "distance_mass"}
        assert {name: found[name] for name in NAMES} == head.measures
    [layer] = report.layers
    assert document["feed_forward"] == [{"layer": 0, **layer.units._asdict()}]
    assert document["layers"] == [{"layer": 0, "head_divergence": layer.head_divergence, **layer.residual._asdict()}]


def test_what_all_heads_have_together() -> None:
    """Means and limits over heads; quantiles over all rows, so a median lies between those of the heads."""
    report = run(build(learned_k=True)).report()
    together = report.all_heads()
    assert set(together) == set(NAMES)
    for name, figures in together.items():
        values = [head.measures[name] for head in report.heads]
        assert figures["mean"] == pytest.approx(np.mean(values), nan_ok=True)
        assert (figures["min"], figures["max"]) == pytest.approx((min(values), max(values)), nan_ok=True)
    for name in report.heads[0].quantiles:
        for mark in ("p5", "p50", "p95"):
            of_heads = [head.quantiles[name][mark] for head in report.heads]
            assert min(of_heads) <= together[name][mark] <= max(of_heads)
        (one,) = report.only([1], [0]).heads
        assert report.only([1], [0]).all_heads()[name].items() >= one.quantiles[name].items()


def test_conditions_find_the_figures_of_all_heads_and_of_one() -> None:
    report = run(build()).report()
    figures = metrics_of(named_metrics(report.as_dict()))
    assert figures["support.p95"] == figures["all_heads.effective_support.p95"] > 1
    assert figures["k.mean"] == 2
    assert figures["head[1.0].keys_95"] == report.heads[2].measures["keys_95"]
    assert figures["layers[1].head_divergence"] == report.layers[1].head_divergence


def test_what_training_records_are_means_over_the_heads_of_a_layer() -> None:
    model, watcher = build(learned_k=True), RecordWatcher()
    report = run(model).report()
    inspect(model, batches(7), CPU, torch.float32, watcher)
    for layer, values in enumerate(map(asdict, watcher.recorded().layers)):
        heads = [head for head in report.heads if head.layer == layer]
        assert values.pop("layer") == layer
        assert 0.5 < values.pop("active_units") <= 1
        assert values.pop("active_blocks") is None
        assert set(values) == {"sparsity_k", "effective_support", "capped_share", "distance_back"}
        for name, value in values.items():
            assert value == pytest.approx(sum(head.measures[name] for head in heads) / 2, rel=1e-5)
    assert len(watcher.recorded().layers) == 2


def test_a_record_of_heads_that_must_cap_everything_has_no_share() -> None:
    watcher = RecordWatcher()
    inspect(build(attn_k=99.0), batches(), CPU, torch.float32, watcher)
    assert [layer.capped_share for layer in watcher.recorded().layers] == [0, 0]


def test_active_units_are_those_above_a_thousandth() -> None:
    """The meaning that docs/metrics.md gives the field, for good."""
    model, watcher = build(), RecordWatcher()
    inspect(model, batches(7), CPU, torch.float32, watcher)
    seen = [one.activations for one in raw(model) if isinstance(one, ObservedFeedForward)]
    expected = [(activations.abs() > 1e-3).double().mean().item() for activations in seen]
    assert [layer.active_units for layer in watcher.recorded().layers] == pytest.approx(expected)


@pytest.mark.parametrize("changes", [{}, {"output_gate": True}, {"normalise": "k"}, {"null_kv": 2, "kv_heads": 1}])
def test_what_the_heads_write_adds_up_to_the_output_of_the_layer(changes: dict[str, Any]) -> None:
    """A single head writes all of it, so its length is known."""
    model = build(heads=1 if "kv_heads" not in changes else 2, depth=1, attn_bias="none", **changes)
    outputs: list[Tensor] = []
    attention = model.each_block()[0].attention
    hook = attention.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    watcher = run(model)
    hook.remove()
    written = [head.measures["written_norm"] for head in watcher.report().heads]
    length = torch.cat(outputs).double().norm(dim=-1).mean().item()
    if len(written) == 1:
        assert written == pytest.approx([length], rel=1e-5)
    else:
        assert sum(written) >= length


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        (None, [0, 1, 2, 3]),
        ("0", [0]),
        ("0,2-3", [0, 2, 3]),
        ("3,1", [3, 1]),
        ("0-3", [0, 1, 2, 3]),
        (" 1 , 2 ", [1, 2]),
    ],
)
def test_a_selection(text: str | None, chosen: list[int]) -> None:
    assert parse_selection(text, 4, "--layers") == chosen


@pytest.mark.parametrize("text", ["4", "0-4", "-1", "3-1", "1-", "", ",", "0,", "a", "1-b", "1.5", "1-2-3", "--"])
def test_a_selection_that_cannot_be_is_one_sentence(text: str) -> None:
    """The sentence names the option, and what may be selected or how to write it."""
    with pytest.raises(ConfigError) as refusal:
        parse_selection(text, 4, "--layers")
    numbers = re.escape(f"--layers {text} is out of range; this model has 0 to 3")
    form = re.escape(f"--layers takes numbers and ranges such as 0,2-3, not {text!r}")
    assert re.fullmatch(f"{numbers}|{form}", str(refusal.value))
