"""The log-probability of continuations, against one row at a time in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cda_cli.errors import ConfigError
from cda_cli.evaluation.loglikelihood import Loglikelihood, TokenPair, loglikelihoods
from cda_cli.model import Transformer
from tests.model.cases import build, tiny

CPU = torch.device("cpu")
SEQ_LEN = 11
TOKENS = st.integers(0, 22)
PAIRS = st.tuples(st.lists(TOKENS, min_size=1, max_size=30), st.lists(TOKENS, min_size=1, max_size=SEQ_LEN))


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(tiny(attention="coordinate-descent", null_kv=1, tied_embeddings=True))


def scored(model: Transformer, pairs: list[TokenPair], batch_size: int) -> list[Loglikelihood]:
    return loglikelihoods(model, pairs, batch_size, CPU, torch.float32)


@torch.no_grad()
def directly(model: Transformer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Nats and whether they are greedy, of a row by itself."""
    seen = [*context, *continuation][-SEQ_LEN - 1 : -1]
    log_p = model(torch.tensor([seen]))[0].double().log_softmax(-1)[-len(continuation) :]
    return log_p[range(len(continuation)), continuation].sum().item(), log_p.argmax(-1).tolist() == continuation


@settings(max_examples=60)
@given(pairs=st.lists(PAIRS, min_size=1, max_size=9), batch_size=st.integers(1, 8))
def test_each_pair_scores_what_it_scores_alone(model: Transformer, pairs: list[TokenPair], batch_size: int) -> None:
    """In the order of the pairs, whatever their lengths, and however they share batches and rows."""
    pairs = [*pairs, (pairs[0][0], [*pairs[0][1][:-1], 22]), pairs[0]]
    for (context, continuation), found in zip(pairs, scored(model, pairs, batch_size), strict=True):
        nats, is_greedy = directly(model, list(context), list(continuation))
        assert found.nats == pytest.approx(nats, abs=1e-4)
        assert found.is_greedy == is_greedy
        assert found.tokens == len(continuation)
        assert found.is_truncated == (len(context) + len(continuation) > SEQ_LEN + 1)


def test_a_greedy_continuation_is_known_as_one(model: Transformer) -> None:
    context, continuation = [3, 4], []
    with torch.no_grad():
        for _ in range(4):
            continuation.append(int(model(torch.tensor([context + continuation]))[0, -1].argmax()))
    other = [*continuation[:-1], (continuation[-1] + 1) % 23]
    assert [one.is_greedy for one in scored(model, [(context, continuation), (context, other)], 2)] == [True, False]


def test_pairs_that_differ_in_the_last_token_share_a_row(model: Transformer) -> None:
    """The choices of a question with one token each cost one row, not one each."""
    rows: list[int] = []
    handle = model.register_forward_hook(lambda module, given, logits: rows.append(len(given[0])))
    done: list[int] = []
    pairs = [([1, 2, 3], [choice]) for choice in range(4)] + [([1, 2], [3, 9])]
    loglikelihoods(model, pairs, 16, CPU, torch.float32, done.append)
    handle.remove()
    assert (rows, done) == ([1], [5])


@pytest.mark.parametrize(
    ("pair", "fault"),
    [
        (([], [1]), "nothing stands before the text"),
        (([1], []), "has no token of its own"),
        (([1], [2] * (SEQ_LEN + 1)), "the continuation has 12 tokens and the model's context 11"),
    ],
)
def test_what_cannot_be_scored_is_refused(model: Transformer, pair: TokenPair, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        scored(model, [([1], [2]), pair], 2)
