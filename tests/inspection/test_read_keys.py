"""The keys that each head reads for the last token are those of the weights that an observer sees."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cda_cli.config import ModelConfig
from cda_cli.inspection.read_keys import keys_read
from cda_cli.inspection.seen_rows import CAPPED_WEIGHT
from cda_cli.model import Transformer
from cda_cli.model.observe import ObservedAttention, observing
from cda_cli.model.rules import base

TOKENS = [7, 3, 9, 9, 1, 30, 12, 4]


def build(**changes: Any) -> Transformer:
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "seq_len": 12, "dim": 16, "depth": 2, "heads": 2, "ff_mult": 2.0, "attn_eps": 0.1}
    return Transformer(ModelConfig(**sizes | changes)).eval()


@pytest.mark.parametrize("rows", [1, 3, 99])
@pytest.mark.parametrize(
    "options",
    [{"attention": "softmax"}, {"attention": "coordinate-descent", "null_kv": 2, "attn_k": 3.0, "learned_k": True}],
    ids=str,
)
def test_they_are_the_largest_of_the_last_row(
    options: dict[str, Any], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows of weights are computed at once."""
    model = build(**options)
    seen: list[ObservedAttention] = []
    with torch.no_grad(), observing(model, seen.append):  # type: ignore[arg-type]
        model(torch.tensor([TOKENS]))
    layers = [each for each in seen if isinstance(each, ObservedAttention)]
    monkeypatch.setattr(base, "BLOCK_SCORES", rows * 2 * len(TOKENS))
    found = keys_read(model, TOKENS, torch.float32, 4)
    assert [(head.layer, head.head) for head in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for head in found:
        observed = layers[head.layer]
        row = observed.weights[0, head.head, -1]
        expected = sorted(range(len(row)), key=lambda key: -row[key].item())[:4]
        places = [None if key < observed.null_keys else key - observed.null_keys for key in expected]
        assert [key.place for key in head.keys] == places
        assert [key.weight for key in head.keys] == pytest.approx([row[key].item() for key in expected], abs=1e-6)
        assert head.row_sum == pytest.approx(row.sum().item())
        assert head.sparsity_k == pytest.approx(observed.sparsity_k[0, head.head, -1].item())


def test_a_weight_at_the_limit_is_marked_where_rows_have_a_budget() -> None:
    """With fewer keys than k, every key is capped. Under softmax the only key has weight 1, which is no limit."""
    capped = keys_read(build(attention="coordinate-descent", attn_k=5.0), TOKENS[:3], torch.float32, 9)
    assert all(key.is_capped and key.weight >= CAPPED_WEIGHT for head in capped for key in head.keys)
    assert [len(head.keys) for head in capped] == [3] * 4
    free = keys_read(build(attention="coordinate-descent", attn_k=1.5, attn_eps=4.0), TOKENS, torch.float32, 9)
    assert not any(key.is_capped for head in free for key in head.keys)
    alone = keys_read(build(attention="softmax"), TOKENS[:1], torch.float32, 9)
    assert [head.keys for head in alone] == [[(0, 1.0, False)]] * 4


def test_the_model_is_left_as_it_was() -> None:
    model = build(attention="coordinate-descent")
    keys_read(model, TOKENS, torch.float32, 1)
    assert all(block.attention.observer is None for block in model.each_block())
