"""Cuts: what a query may read is reduced to n keys, and the loss is compared on the same windows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from cda_cli.causal.cuts import CHOICES, UNITS, Cut, UnitCut, parse_cuts
from cda_cli.data import Tokens
from cda_cli.errors import ConfigError
from cda_cli.model import Rows, editing
from cda_cli.model.rules import base
from tests.causal.models import RULES, SEQ_LEN, build, differences, effects_of, text


def rows(seed: int, B: int, H: int, t: int, S: int, null_keys: int) -> Rows:
    """The last t rows of a sequence whose S keys are null keys and the queries of the sequence."""
    every = torch.randn(B, H, S - null_keys, S, generator=torch.Generator().manual_seed(seed))
    scores = every[:, :, -t:]
    mask = torch.ones(t, S, dtype=torch.bool).tril(S - t)
    return Rows(
        scores,
        torch.ones(B, H, t),
        1.0,
        mask,
        null_keys,
        S - t,
        lambda mask: scores.masked_fill(~mask, -torch.inf).softmax(-1),
        lambda chosen: every[:, torch.arange(H)[:, None], chosen - null_keys],
    )


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


def test_distance_matched_keys_are_those_of_another_query() -> None:
    """If every query has its largest scores at the same offsets, another query of the head has them too.

    An offset that reaches before the first key is passed over.
    """
    T, favoured = 24, (7, 3, 5)
    back = torch.arange(T)[:, None] - torch.arange(T)
    every = torch.zeros(1, 1, T, T)
    for rank, offset in enumerate(favoured):
        every[0, 0, back == offset] = 9.0 - rank
    mask = back >= 0
    given_rows = Rows(
        torch.randn(1, 1, T, T), torch.ones(1, 1, T), 1.0, mask, 0, 0,
        lambda mask: mask.float(), lambda chosen: every[:, :, chosen[0]],
    )  # fmt: skip
    kept = Cut("distance-matched", 2)(given_rows)[0, 0] > 0
    offsets = [set((query - kept[query].nonzero().squeeze(-1)).tolist()) for query in range(T)]
    assert offsets[14:] == [{7, 3}] * 10, "the other queries see at least half as many keys, so they reach offset 7"
    assert offsets[6] == {3, 5}


def test_cut_units_add_the_longest_vectors_and_random_ones_as_long_a_sum() -> None:
    model = build(depth=1)
    out = model.each_block()[0].feed_forward.proj_out.weight
    seen = []

    def see(layer: int, units: Tensor) -> Tensor:
        seen.append(units)
        return units

    tokens = torch.randint(23, (2, SEQ_LEN), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        with editing(model, units=see):
            model(tokens)
        for cut in (UnitCut(3), UnitCut(3, True)):
            with cut.applied(model), editing(model, units=see):
                model(tokens)
    whole, top, drawn = seen
    lengths = whole.abs() * out.norm(dim=0)
    assert ((top != 0).sum(-1) == 3).all()
    assert torch.equal(top != 0, lengths >= lengths.topk(3, -1).values[..., -1:])
    assert torch.equal(top, whole.where(top != 0, 0.0))
    assert ((drawn != 0).sum(-1) == 3).all()
    torch.testing.assert_close((drawn @ out.T).norm(dim=-1), (top @ out.T).norm(dim=-1))
    assert len({tuple(row.nonzero().squeeze(-1).tolist()) for row in drawn[0]}) > SEQ_LEN // 2, "tokens share units"


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
    """Also of the random keys and units, and of those at the offsets of another query."""
    model, tokens = build(**rule), text(count)
    cuts = [f"{choice}:2" for choice in (*CHOICES, "units", "random-units")]
    one, other = (effects_of(model, tokens, cuts, batch_size=size) for size in sizes)
    assert one.comparison.loss().value == pytest.approx(other.comparison.loss().value, abs=1e-5)
    assert differences(one) == pytest.approx(differences(other), abs=2e-5)


@pytest.mark.parametrize("null_kv", [0, 2])
def test_blocks_of_rows_change_no_figure(null_kv: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text is computed in blocks, which draw the same keys and know the same queries."""
    model, tokens = build(attention="coordinate-descent", attn_eps=3.0, null_kv=null_kv), text(60)
    asked = [f"{choice}:3" for choice in [*CHOICES, *UNITS]], ["gate", "softmax", "capped"]
    whole = effects_of(model, tokens, *asked)
    monkeypatch.setattr(base, "BLOCK_SCORES", 2 * 3 * 3 * (SEQ_LEN + null_kv))  # two rows of three windows and heads
    monkeypatch.setattr("cda_cli.causal.cuts.PIECE", 2 * 3 * model.config.ff_units)
    in_blocks = effects_of(model, tokens, *asked)
    assert differences(in_blocks) == pytest.approx(differences(whole), abs=1e-5)
    gates = [effect.as_dict() for found in (whole, in_blocks) for effect in found.effects]
    shares = [gate["gate_equivalent_rows"] for gate in gates if gate["name"] == "gate"]
    assert shares[0] == shares[1]
    assert 0 < shares[0] < 1


@pytest.mark.parametrize("rule", RULES)
def test_all_keys_and_units_are_no_cut(rule: dict[str, Any]) -> None:
    model = build(null_kv=1, **rule)
    found = effects_of(model, text(70), ["recent:11", "distance-matched:11", "units:24", "random-units:24", "top:1"])
    *whole, cut = found.effects
    for effect in whole:
        assert effect.difference.value == pytest.approx(0, abs=1e-5), effect.intervention.name
        assert effect.difference.error == pytest.approx(0, abs=1e-5)
    assert abs(cut.difference.value) > 1e-3
    expected = found.comparison.bits_per_byte().value + cut.difference.value
    assert cut.evaluation.bits_per_byte == pytest.approx(expected)


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
    (found,) = effects_of(model, tokens, ["top:1"]).effects
    assert found.difference.value == pytest.approx(differences.mean().item(), abs=1e-5)
    assert found.difference.error == pytest.approx(differences.std().item() / math.sqrt(8), rel=1e-3)


def test_cuts_are_read() -> None:
    assert parse_cuts(["top:64,8", "random:3:drop"]) == [Cut("top", 64), Cut("top", 8), Cut("random", 3, True)]
    assert parse_cuts(["sink:1..6", "units:2"]) == [*(Cut("sink", keys) for keys in (1, 2, 4, 6)), UnitCut(2)]
    assert [cut.name for cut in parse_cuts(["top:4:drop", "random-units:1"])] == ["top-drop[4]", "random-units[1]"]
    curve = parse_cuts(["curve"])
    assert len(curve) == len(set(curve)) == 9 * len(CHOICES)
    assert parse_cuts(["curve:1..256"]) == curve


@pytest.mark.parametrize(
    "given_text",
    ["", "top", "top:", "top:0", "top:-1", "top:x", "top:3,", "tip:3", "top:3:keep", "top:4..2", "top:0..4", "top:1..",
     "units:3:drop", "curve:x"],
)  # fmt: skip
def test_what_is_no_cut_is_refused(given_text: str) -> None:
    with pytest.raises(ConfigError, match="cut"):
        parse_cuts([given_text])
