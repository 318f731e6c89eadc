"""Many requests in one batch: each gets the tokens that it gets alone, and the batch is never in its way."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cda_cli.config import ModelConfig
from cda_cli.generation import Generated, Generation, Request, SamplingSettings
from cda_cli.model import Transformer
from tests.devices import DEVICES
from tests.model.cases import FAMILIES, TINY, cases

VOCABULARY = TINY["vocab_size"]
RULES = [
    {"attention": "hard-topk", "null_kv": 1},
    {"attention": "entmax", "position": "rotary"},
    {"attention": "tempered-softmax", "null_kv": 2, "heads": 4, "kv_heads": 2, "dim_head": 4},
    *FAMILIES,
]
SETTINGS = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.none() | st.integers(1, 30),
    top_p=st.none() | st.floats(0.3, 1),
    min_p=st.none() | st.floats(0.01, 0.5),
    repetition_penalty=st.sampled_from([1.0, 1.4]),
    presence_penalty=st.sampled_from([0.0, 0.8]),
)
PROMPT = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=TINY["seq_len"])
REQUESTS = st.lists(
    st.builds(Request, PROMPT, st.integers(0, 25), SETTINGS, seed=st.integers(0, 2**63), logprobs=st.integers(0, 3)),
    min_size=1,
    max_size=7,
)


# Of unequal lengths, some of which grow past 256 and past the context of the model below, with every setting. There are
# more of them than rows, so rows leave and others enter.
UNEQUAL = [
    Request([1, 2, 3], 9, SamplingSettings(temperature=0.0), 0, logprobs=2),
    Request([5] * 251, 14, SamplingSettings(temperature=1.3), 1),
    Request([7, 8], 12, SamplingSettings(0.9, repetition_penalty=1.4, presence_penalty=0.8), 2, logprobs=3),
    Request([4, 9] * 136, 6, SamplingSettings(0.8, top_k=9, top_p=0.9, min_p=0.02), 3),
    Request([6], 5, SamplingSettings(temperature=0.0, presence_penalty=0.5), 4),
]
DECODED = [
    {"attention": "softmax"},
    {"attention": "coordinate-descent", "learned_k": True, "position": "rotary", "qk_norm": True, "null_kv": 1},
    {"attention": "coordinate-descent", "solver": "iterative", "ff": "coordinate-descent", "norm": "rmsnorm"},
]


def build(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).eval()
    torch.nn.init.normal_(model.to_logits.weight, std=0.6)
    return model


def generated(model: Transformer, requests: list[Request], **options: Any) -> dict[int, list[Generated]]:
    found: dict[int, list[Generated]] = defaultdict(list)
    for each in Generation(model, requests, **options):
        found[each.request].append(each)
    return found


def texts(model: Transformer, requests: list[Request], **options: Any) -> list[list[int]]:
    found = generated(model, requests, **options)
    return [[each.token for each in found[number]] for number in range(len(requests))]


@pytest.mark.parametrize("options", [*({"case": number} for number in range(0, 24, 3)), *RULES], ids=str)
@settings(max_examples=3, deadline=None)
@given(requests=REQUESTS, batch_size=st.integers(1, 8), order=st.randoms(use_true_random=False))
def test_each_request_gets_the_tokens_that_it_gets_alone(
    options: dict[str, Any], requests: list[Request], batch_size: int, order: Any
) -> None:
    """In any order, beside any others, with more requests than rows, past the context, and with its own settings."""
    options = dict(options)
    case = options.pop("case", None)
    model = build(cases()[case] if case is not None else ModelConfig(**TINY | options))
    shuffled = list(range(len(requests)))
    order.shuffle(shuffled)
    together = texts(model, [requests[number] for number in shuffled], batch_size=batch_size)
    for number, found in zip(shuffled, together, strict=True):
        assert [found] == texts(model, [requests[number]]), f"request {number}"


@settings(max_examples=4, deadline=None)
@given(requests=REQUESTS, batch_size=st.integers(2, 8))
def test_rows_without_a_request_change_nothing(requests: list[Request], batch_size: int) -> None:
    """A compiled step, like a CUDA graph, takes a round number of rows, and reads their lengths on the device."""
    model = build(ModelConfig(**TINY | {"attention": "softmax", "position": "rotary", "null_kv": 1}))
    with torch.compiler.set_stance("force_eager"):  # Compiling takes long, and is PyTorch's.
        together = texts(model, requests, batch_size=batch_size, compiled=True)
    assert together == texts(model, requests)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", DECODED, ids=str)
def test_a_batch_on_any_device_gives_the_tokens_of_plain_steps(options: dict[str, Any], device: str) -> None:
    """On a GPU steps are CUDA graphs, one for each power of two of rows and of positions, captured on its device."""
    model = build(ModelConfig(**TINY | {"seq_len": 275, "dim_head": 16} | options))
    alone = [generated(model, [request])[0] for request in UNEQUAL]
    together = generated(model.to(device), UNEQUAL, batch_size=3)
    for number, expected in enumerate(alone):
        found = together[number]
        assert [each.token for each in found] == [each.token for each in expected], f"request {number}"
        assert len(found) == UNEQUAL[number].max_new_tokens
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert dict(ours.alternatives) == pytest.approx(dict(theirs.alternatives), abs=1e-4)
