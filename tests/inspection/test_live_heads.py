"""Live heads keep queries and keys in 8 bits, from which the scores of the model follow to the steps of both."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cda_cli.config import ModelConfig
from cda_cli.inspection import LiveCollector
from cda_cli.inspection.live_heads import Quantised, live_bytes
from cda_cli.model import Transformer
from cda_cli.model.observe import ObservedAttention, ObservedFeedForward, observing
from cda_cli.ops import soft_topk

TOKENS, NULL = 20, 1


def collected(**changes: float | str) -> tuple[Transformer, LiveCollector, dict[int, torch.Tensor]]:
    """A model of random weights, what was collected of one pass, and its weights by layer [H, T, S]."""
    torch.manual_seed(0)
    settings = {"vocab_size": 11, "seq_len": TOKENS, "dim": 16, "depth": 2, "heads": 2, "null_kv": NULL, "attn_k": 2.0}
    model = Transformer(ModelConfig(**{**settings, "attn_eps": 0.2, **changes})).eval()
    collector = LiveCollector()
    weights: dict[int, torch.Tensor] = {}

    def see(seen: ObservedAttention | ObservedFeedForward) -> None:
        if isinstance(seen, ObservedAttention):
            collector.add(seen)
            weights[seen.layer] = seen.weights[0]

    with torch.no_grad(), observing(model, see):
        model(torch.randint(0, 11, (2, TOKENS)))
    return model, collector, weights


@pytest.mark.parametrize("changes", [{}, {"position": "rotary", "qk_norm": True}, {"eps_anneal_start": 4.0}])
def test_rows_follow_from_queries_and_keys(changes: dict[str, float | str]) -> None:
    """Also while ε anneals by a factor on the query."""
    model, collector, weights = collected(**changes)
    eps = model.attention_eps
    assert eps is not None
    for layer in range(2):
        for number in range(2):
            head = collector.head(layer, number, TOKENS, NULL)
            queries, keys = (torch.from_numpy(each.steps * each.scale[:, None]) for each in (head.queries, head.keys))
            mask = torch.ones(TOKENS, NULL + TOKENS, dtype=torch.bool).tril(NULL)
            found = soft_topk(queries @ keys.T, 2.0, mask=mask, eps=eps)
            # A component is off by half a step of its vector. By how much a score can be off, log λ · ε can twice.
            off_queries, off_keys = (torch.from_numpy(each.scale) / 2 for each in (head.queries, head.keys))
            off = off_queries[:, None] * (keys.abs().sum(1) + 8 * off_keys) + queries.abs().sum(1, True) * off_keys
            factor = (2 * off.masked_fill(~mask, 0).amax(1, keepdim=True) / eps).exp()
            assert (found <= weights[layer][number] * factor * 1.001 + 1e-6).all()
            assert (found * factor * 1.001 + 1e-6 >= weights[layer][number]).all()
            assert factor.median() < 2, "the bound says nothing"


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_a_component_is_off_by_half_a_step_at_most(count: int, width: int, seed: int) -> None:
    vectors = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed % 9 - 4)
    found = Quantised.of(vectors)
    assert found.steps.dtype == np.int8
    off = np.abs(found.steps * found.scale[:, None] - vectors.numpy()).max(1)
    assert (off <= 0.501 * found.scale + 1e-7).all()


def test_the_bytes_are_as_many_as_foreseen() -> None:
    _, collector, _ = collected()
    for queries in (5, TOKENS):
        assert len(collector.head(0, 1, queries, NULL).to_bytes()) == live_bytes(queries, NULL, 8)
