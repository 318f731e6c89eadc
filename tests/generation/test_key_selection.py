"""Generation that reads some of the keys: as with all keys where nothing is left out, and each request as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cda_cli.config import ModelConfig
from cda_cli.errors import ConfigError
from cda_cli.generation import Generation, Request, SamplingSettings, decoder
from cda_cli.model import PAGE, KeyReads, KeySelection, Transformer
from tests.model.cases import TINY

CONTEXT = 400
LENGTHS = (CONTEXT - 4, 131, 1, 127, CONTEXT - 40)  # of prompts: one outgrows the context, some cross pages
NEW_TOKENS = 10
RULES = (
    {"attention": "softmax", "null_kv": 1},
    {"attention": "coordinate-descent", "attn_eps": 0.02, "learned_k": True, "heads": 4, "kv_heads": 2},
)
each_rule = pytest.mark.parametrize("options", RULES, ids=str)


def build(options: dict[str, Any]) -> Transformer:
    """A model whose bounds are near its scores, since heads have two channels."""
    torch.manual_seed(0)
    sizes = {"seq_len": CONTEXT, "position": "none", "dim_head": 2}
    return Transformer(ModelConfig(**TINY | sizes | options)).eval()


def requests() -> list[Request]:
    """Each page of a prompt has three tokens of its own, so that bounds tell pages apart."""
    generator = torch.Generator().manual_seed(1)
    prompts = [
        (
            (3 * (torch.arange(length) // PAGE) + torch.randint(3, (length,), generator=generator)) % TINY["vocab_size"]
        ).tolist()
        for length in LENGTHS
    ]
    return [Request(prompt, NEW_TOKENS, SamplingSettings(), seed, 1) for seed, prompt in enumerate(prompts)]


def generated(
    model: Transformer, asked: list[Request], selection: KeySelection | None, batch_size: int = 1
) -> tuple[list[list[tuple[int, float]]], KeyReads | None]:
    """The tokens of each request with their log-probabilities, and what was read."""
    generation = Generation(model, asked, batch_size=batch_size, selection=selection)
    found: list[list[tuple[int, float]]] = [[] for _ in asked]
    for each in generation:
        assert each.logprob is not None
        found[each.request].append((each.token, each.logprob))
    return found, generation.reads()


@each_rule
@pytest.mark.parametrize("batch_size", [1, 3])
def test_without_tolerance_every_bit_is_as_with_all_keys(options: dict[str, Any], batch_size: int) -> None:
    model = build(options)
    expected, of_all = generated(model, requests(), None, batch_size)
    assert of_all is None
    found, reads = generated(model, requests(), KeySelection(None, 0.0), batch_size)
    assert found == expected
    assert reads is not None
    assert reads.keys_read == reads.keys > 0 == reads.mass_left_out
    assert generated(model, requests(), KeySelection(CONTEXT + 64), batch_size) == (expected, None)


@each_rule
@pytest.mark.parametrize("selection", [KeySelection(128), KeySelection(None, 0.9)], ids=str)
def test_each_request_reads_what_it_reads_alone(
    options: dict[str, Any], selection: KeySelection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though rows move, a row had a longer text before, and a prompt is read in other parts, one of a single token."""
    monkeypatch.setattr(decoder, "PREFILL_POSITIONS", 1)
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", LENGTHS[0] - 1)
    model = build(options)
    together, reads = generated(model, requests(), selection, batch_size=2)
    assert reads is not None
    assert reads.keys_read < 0.98 * reads.keys, "hardly anything is left out"
    assert 0 < reads.mass_left_out <= 1
    for number, request in enumerate(requests()):
        [alone], _ = generated(model, [request], selection)
        assert [token for token, _ in alone] == [token for token, _ in together[number]], f"request {number}"
        torch.testing.assert_close(
            [logprob for _, logprob in alone], [logprob for _, logprob in together[number]], rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("options", [{"attention": "hard-topk"}, {"solver": "iterative"}], ids=str)
def test_a_rule_whose_loss_has_no_bound_is_refused(options: dict[str, Any]) -> None:
    model = build({"attention": "coordinate-descent"} | options)
    with pytest.raises(ConfigError, match=r"--max-keys.*leave it out"):
        Generation(model, requests(), selection=KeySelection(128))
