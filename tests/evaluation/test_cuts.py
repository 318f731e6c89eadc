"""Cuts: what a query may read is reduced to n keys, and the loss is compared on the same windows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cda_cli.data import Batch, Tokens, evaluation_batches
from cda_cli.errors import ConfigError
from cda_cli.evaluation import (
    Comparison,
    Cut,
    CutEvaluation,
    compared_cuts,
    joined,
    measure,
    parse_cuts,
    ways_of_cuts,
    windows_as_units,
)
from cda_cli.evaluation.cuts import CHOICES
from cda_cli.model import Rows, Transformer, editing
from tests.model.cases import tiny

CPU = torch.device("cpu")
SEQ_LEN = 11
RULES = [
    {"attention": "softmax"},
    {"attention": "coordinate-descent"},
    {"attention": "coordinate-descent", "learned_k": True, "learned_k_bias": 0.5},
]


def build(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(tiny(tied_embeddings=False, **changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("to_qkv.weight", "to_logits.weight")):
            nn.init.normal_(parameter, std=0.7)
    return model


def text(count: int, seed: int = 0) -> Tokens:
    ids = torch.randint(23, (count,), generator=torch.Generator().manual_seed(seed)).numpy().astype("uint16")
    return Tokens(ids, (ids % 3 + 1).astype("uint8"), text_bytes=int((ids % 3 + 1).sum()))


def rows(seed: int, B: int, H: int, t: int, S: int, null_keys: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(B, H, t, S, generator=generator)
    mask = torch.ones(t, S, dtype=torch.bool).tril(S - t)
    return Rows(scores, mask, null_keys, lambda mask: scores.masked_fill(~mask, -torch.inf).softmax(-1))


def evaluate_cuts(
    model: Transformer, batches: Iterable[Batch], cuts: list[Cut]
) -> tuple[Comparison, list[CutEvaluation]]:
    sums = joined(measure(model, batches, CPU, torch.float32, ways_of_cuts(model, cuts)))
    comparison = Comparison(sums, windows_as_units(len(sums[0])))
    return comparison, compared_cuts(comparison, cuts)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 999),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6)),
    earlier=st.integers(0, 5),
    null_keys=st.integers(0, 2),
    choice=st.sampled_from(sorted(CHOICES)),
    keys=st.integers(1, 9),
    drops=st.booleans(),
)
def test_a_cut_keeps_n_keys_of_each_row(
    seed: int, sizes: tuple[int, int, int], earlier: int, null_keys: int, choice: str, keys: int, drops: bool
) -> None:
    """The null keys stay, no unseen key comes in, and the rule computes the rows anew unless the rest is dropped."""
    given_rows = rows(seed, *sizes, sizes[2] + earlier + null_keys, null_keys)
    cut = Cut(choice, keys, drops)(given_rows)
    seen = given_rows.mask.sum(-1) - null_keys
    kept = (cut > 0)[..., null_keys:].sum(-1)
    assert torch.equal(kept, seen.clamp(max=keys).expand_as(kept))
    assert not (cut * ~given_rows.mask).any()
    assert (cut[..., :null_keys] > 0).all()
    if drops:
        assert torch.equal(cut, given_rows.weights(given_rows.mask).where(cut > 0, 0.0))
    else:
        assert torch.equal(cut, given_rows.weights(cut > 0))


def test_each_choice_keeps_its_keys() -> None:
    given_rows = rows(1, 1, 2, 3, 9, 0)
    scores = given_rows.scores.masked_fill(~given_rows.mask, -torch.inf)

    def kept(choice: str) -> Tensor:
        return Cut(choice, 2)(given_rows) > 0

    best = torch.zeros_like(scores).scatter(-1, scores.topk(2).indices, 1.0) > 0
    assert torch.equal(kept("top"), best)
    other = given_rows.scores.flip(1).masked_fill(~given_rows.mask, -torch.inf)  # of two heads, the other one
    assert torch.equal(kept("other-head"), torch.zeros_like(scores).scatter(-1, other.topk(2).indices, 1.0) > 0)
    offsets = torch.arange(7, 10)[:, None] - torch.arange(1, 10)
    assert torch.equal(kept("recent"), ((offsets >= 0) & (offsets < 2)).expand_as(scores))
    assert torch.equal(kept("sink"), ((offsets == 0) | (torch.arange(9) == 0)).expand_as(scores))


def test_random_keys_are_spread_evenly() -> None:
    """Each of 400 keys is kept as often as another, within what chance allows, and rows and heads differ."""
    given_rows = rows(0, 1, 16, 64, 464, 0)
    kept = (Cut("random", 40)(given_rows) > 0)[..., :401].float()
    often = kept.mean((0, 1, 2))
    expected = 40 / torch.arange(401, 465).float().mean()
    assert (often - expected).abs().max() < 6 * math.sqrt(expected * (1 - expected) / (16 * 64))
    overlap = (kept[0, 0, 0] * kept[0, 0, 1]).sum(), (kept[0, 0, 0] * kept[0, 1, 0]).sum()
    assert max(overlap) < 15, "rows or heads share their random keys"


@pytest.mark.parametrize("rule", RULES)
def test_recent_keys_alone_let_nothing_earlier_through(rule: dict[str, Any]) -> None:
    """In a model of one layer a query that reads its last three keys depends on no earlier token."""
    model = build(depth=1, **rule)
    tokens = torch.randint(23, (1, SEQ_LEN), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, : SEQ_LEN - 3] = (tokens[0, : SEQ_LEN - 3] + 7) % 23
    with torch.no_grad(), editing(model, Cut("recent", 3)):
        before, after = model(tokens)[0, -1], model(changed)[0, -1]
        inside = model(torch.cat((tokens[:, :-2], changed[:, -2:] + 1), 1) % 23)[0, -1]
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    assert (before - inside).abs().max() > 0.1
    with torch.no_grad():
        assert (model(tokens)[0, -1] - model(changed)[0, -1]).abs().max() > 0.1, "the cut ends with its block"


def test_the_top_keys_of_a_softmax_are_a_hard_topk() -> None:
    """The rule hard-topk computes the same by code of its own."""
    soft = build(attention="softmax")
    hard = build(attention="hard-topk", attn_k=3.0, attn_eps=1.0)
    hard.load_state_dict(soft.state_dict())
    tokens = torch.randint(23, (4, SEQ_LEN), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), editing(soft, Cut("top", 3)):
        torch.testing.assert_close(soft(tokens), hard(tokens), rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(rule=st.sampled_from(RULES), count=st.integers(2, 60), sizes=st.tuples(st.integers(1, 4), st.integers(5, 9)))
def test_the_batch_size_changes_no_figure(rule: dict[str, Any], count: int, sizes: tuple[int, int]) -> None:
    model, tokens = build(**rule), text(count)
    cuts = parse_cuts([f"{choice}:2" for choice in CHOICES])
    one, other = (evaluate_cuts(model, evaluation_batches(tokens, SEQ_LEN, size), cuts) for size in sizes)
    assert one[0].loss().value == pytest.approx(other[0].loss().value, abs=1e-5)
    for mine, theirs in zip(one[1], other[1], strict=True):
        assert mine.evaluation.loss == pytest.approx(theirs.evaluation.loss, abs=1e-5), mine.cut
        assert mine.difference.value == pytest.approx(theirs.difference.value, abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_all_keys_are_no_cut(rule: dict[str, Any]) -> None:
    model, tokens = build(null_kv=1, **rule), text(70)
    batches = evaluation_batches(tokens, SEQ_LEN, 3)
    whole, compared = evaluate_cuts(model, batches, parse_cuts(["recent:11", "top:1"]))
    assert compared[0].difference.value == pytest.approx(0, abs=1e-5)
    assert compared[0].difference.error == pytest.approx(0, abs=1e-5)
    assert abs(compared[1].difference.value) > 1e-3
    assert compared[1].evaluation.bits_per_byte == pytest.approx(
        whole.bits_per_byte().value + compared[1].difference.value
    )


def test_the_error_is_that_of_paired_windows() -> None:
    """Over windows of equal bytes it is that of the mean of their differences."""
    model, count = build(attention="softmax"), 8 * SEQ_LEN + 1
    ids = text(count).ids
    tokens = Tokens(ids, (ids * 0 + 2).astype("uint8"), text_bytes=2 * count)
    cut = Cut("top", 1)

    def bits(editor: Cut | None) -> Tensor:
        found = []
        for first in range(0, count - 1, SEQ_LEN):
            window = torch.from_numpy(ids[first : first + SEQ_LEN + 1].astype("int64"))
            if editor is None:
                logits = model(window[None, :-1])[0]
            else:
                with editing(model, editor):
                    logits = model(window[None, :-1])[0]
            found.append(nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum"))
        return torch.stack(found) / math.log(2) / (2 * SEQ_LEN)

    with torch.no_grad():
        differences = bits(cut) - bits(None)
    _, (found,) = evaluate_cuts(model, evaluation_batches(tokens, SEQ_LEN, 3), [cut])
    assert found.difference.value == pytest.approx(differences.mean().item(), abs=1e-5)
    assert found.difference.error == pytest.approx(differences.std().item() / math.sqrt(8), rel=1e-3)


def test_cuts_are_read() -> None:
    assert parse_cuts(["top:64,8", "random:3:drop"]) == [Cut("top", 64), Cut("top", 8), Cut("random", 3, True)]


@pytest.mark.parametrize("given_text", ["", "top", "top:", "top:0", "top:-1", "top:x", "top:3,", "tip:3", "top:3:keep"])
def test_what_is_no_cut_is_refused(given_text: str) -> None:
    with pytest.raises(ConfigError, match="cut"):
        parse_cuts([given_text])
