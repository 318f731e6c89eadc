"""The report says what the model selects, and making it leaves the model unchanged."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.data import Batch, Tokens, evaluation_batches
from cda_cli.errors import ConfigError
from cda_cli.inspection import Report, Watcher, effective_support, inspect, layer_means, parse_selection
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


def run(model: Transformer, **changes: Any) -> Watcher:
    return inspect(model, changes.pop("text", batches()), CPU, torch.float32, **changes)


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
        assert head.sparsity_k == pytest.approx(k.mean().item(), rel=1e-5)
        assert head.row_sum == pytest.approx(at_most_visible(k, null_kv).mean().item(), rel=1e-5)
        assert head.row_sum_error < 1e-5
        if attention == "softmax":
            assert head.sparsity_k == 1
            assert head.row_sum == pytest.approx(1)
        elif not learned_k:
            assert head.sparsity_k == 2


def test_an_iteration_that_stops_early_shows_in_the_row_sums() -> None:
    report = run(build(solver="iterative", n_iters=1)).report()
    assert max(head.row_sum_error for head in report.heads) > 1e-2


@pytest.mark.parametrize("attention", ["softmax", "coordinate-descent"])
def test_the_measures_are_the_means_over_the_text(attention: str) -> None:
    model = build(attention=attention)
    report = run(model).report()
    position = torch.arange(12)
    back = (position[:, None] - position).clamp(min=0)
    for one in raw(model):
        if isinstance(one, ObservedFeedForward):
            unit = report.feed_forward[one.layer]
            active = one.activations.abs() > 1e-3
            assert unit == (one.layer, 32, pytest.approx(active.sum(-1).double().mean().item()), unit.dead_units)
            assert unit.dead_units == int((~active.flatten(0, 1).any(0)).sum())
            continue
        for head in (head for head in report.heads if head.layer == one.layer):
            weights, k = one.weights[:, head.head].double(), one.sparsity_k[:, head.head]
            bounded = position + 1 > k[0]
            capped = ((weights >= 1 - 1e-6).sum(-1) / k)[:, bounded]
            assert head.effective_support == pytest.approx(effective_support(weights).mean().item())
            assert head.attended_entries == pytest.approx((weights > 1e-3).sum(-1).double().mean().item())
            assert head.capped_share == pytest.approx(capped.mean().item())
            assert head.distance_back == pytest.approx(
                ((weights * back).sum(-1) / weights.sum(-1)).mean().item(), rel=1e-5
            )


def test_a_head_that_must_cap_everything_has_no_share() -> None:
    """k covers the whole context, so no row is bounded, and 0 is not divided by 0."""
    for head in run(build(attn_k=99.0)).report().heads:
        assert head.capped_share == 0
        assert head.row_sum == pytest.approx(6.5)
        assert head.effective_support == pytest.approx(6.5)


def test_the_batch_size_does_not_show() -> None:
    model = build(learned_k=True, ff="coordinate-descent")
    one, other = (run(model, text=batches(size)).report() for size in (1, 7))
    for left, right in zip([*one.heads, *one.feed_forward], [*other.heads, *other.feed_forward], strict=True):
        assert left._asdict() == pytest.approx(right._asdict(), rel=1e-5, abs=1e-6)


def test_dead_units_are_found() -> None:
    model = build()
    with torch.no_grad():
        model.each_block()[1].feed_forward.proj_in.weight[:5] = 0
        model.each_block()[1].feed_forward.proj_in.bias[:5] = 0
    first, second = run(model).report().feed_forward
    assert (first.dead_units, second.dead_units) == (0, 5)
    assert second.active_units <= 27


def test_the_kept_weights_are_those_of_the_first_window() -> None:
    model = build(null_kv=1)
    seen = [one for one in raw(model) if isinstance(one, ObservedAttention)]
    kept = run(model, keep=(1, 0)).kept
    assert kept is not None
    torch.testing.assert_close(kept, seen[1].weights[0, 0], atol=1e-5, rtol=0)
    assert run(model).kept is None


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
    for part, all_rows in zip(found.report().heads, whole.report().heads, strict=True):
        assert part == pytest.approx(all_rows, rel=1e-5, abs=1e-5)
    assert found.report().feed_forward == whole.report().feed_forward


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    """Its mode and its observers are restored, also after an error. Dropout is off meanwhile."""
    model = build(dropout=0.5).train(training)
    heard: list[int] = []
    assert run(model, advance=heard.append).report() == run(build()).report()
    assert heard == [3, 3, 1]
    beyond = Batch(*(torch.zeros(1, 13, dtype=torch.int64) for _ in range(2)), torch.zeros(1))
    with pytest.raises(ValueError, match="exceed the context"):
        run(model, text=[beyond])
    assert all(module.training is training for module in model.modules())
    assert all(block.attention.observer is block.feed_forward.observer is None for block in model.each_block())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_some_layers_and_heads() -> None:
    report = run(build(depth=3, heads=4)).report()
    part = report.only([0, 2], [1, 3])
    assert [(head.layer, head.head) for head in part.heads] == [(0, 1), (0, 3), (2, 1), (2, 3)]
    assert [unit.layer for unit in part.feed_forward] == [0, 2]
    assert part.tokens == report.tokens
    assert set(part.heads) <= set(report.heads)


def test_the_report_for_machines_holds_everything() -> None:
    report = run(build()).report()
    document = report.as_dict()
    assert [dict(head) for head in document["heads"]] == [head._asdict() for head in report.heads]
    assert [dict(unit) for unit in document["feed_forward"]] == [unit._asdict() for unit in report.feed_forward]
    assert document["tokens"] == 84


def test_the_measures_of_a_layer_are_means_over_its_heads() -> None:
    report = run(build(learned_k=True)).report()
    for layer, values in enumerate(map(asdict, layer_means(report))):
        heads = [head for head in report.heads if head.layer == layer]
        assert values.pop("layer") == layer
        assert values.pop("active_units") == pytest.approx(report.feed_forward[layer].active_units / 32)
        assert set(values) == {"sparsity_k", "effective_support", "capped_share", "distance_back"}
        for name, value in values.items():
            assert value == pytest.approx(sum(getattr(head, name) for head in heads) / 2)
    assert len(layer_means(report)) == 2
    assert layer_means(Report([], [], 0)) == ()


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
