"""Models of transformers as an inspection sees them: the weights that they attend with, and whose outputs they keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cda_cli
import cda_cli.transformers as soft_topk
from cda_cli.errors import ConfigError
from cda_cli.inspection.seen_rows import SeenRows
from cda_cli.model.observe import ObservedAttention, ObservedFeedForward
from cda_cli.observed_transformers import IMPLEMENTATION, describe, observing
from tests.transformers_models import DECODERS, build

TOKENS = torch.randint(1, 61, (1, 23), generator=torch.Generator().manual_seed(0))


class Letters:
    """A tokenizer of 26 letters."""

    def encode(self, text: str) -> list[int]:
        return [1 + ord(letter) - ord("a") for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + number - 1) for number in ids)


@torch.no_grad()
def seen(model: Any) -> tuple[list[ObservedAttention], list[ObservedFeedForward], dict[int, Tensor], Tensor]:
    """What an observer sees of one pass: attention, feed-forward, the residual stream, and the logits."""
    heard: list[Any] = []
    residual: dict[int, Tensor] = {}
    with observing(model, heard.append, residual.__setitem__):
        logits = model(input_ids=TOKENS, use_cache=False).logits
    attention = [each for each in heard if isinstance(each, ObservedAttention)]
    return attention, [each for each in heard if isinstance(each, ObservedFeedForward)], residual, logits


def hooks(model: Any) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


@pytest.mark.parametrize("kind", [*DECODERS, "gemma2", "opt"])
@torch.no_grad()
def test_the_weights_are_those_of_transformers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As eager attention returns them, in several blocks of rows; the output does not change."""
    settings = {"attention_dropout": 0.0, "dropout": 0.0, "word_embed_proj_dim": 32, "ffn_dim": 48}
    model = build(kind, "eager", dtype=torch.float32, **(settings if kind == "opt" else {}))
    whole = model(input_ids=TOKENS, use_cache=False, output_attentions=True, output_hidden_states=True)
    monkeypatch.setattr("cda_cli.observed_transformers.BLOCK_SCORES", 4 * 23 * 10)
    before = hooks(model)
    attention, units, residual, logits = seen(model)
    torch.testing.assert_close(logits, whole.logits, atol=1e-4, rtol=1e-4)
    for layer, expected in enumerate(whole.attentions):
        blocks = [each for each in attention if each.layer == layer]
        assert [each.position for each in blocks] == [0, 10, 20]
        torch.testing.assert_close(torch.cat([each.weights for each in blocks], 2), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(residual[0], whole.hidden_states[1])
    assert [(each.layer, each.activations.shape[-1], tuple(each.to_out.shape)) for each in units] == [
        (layer, units[0].activations.shape[-1], (32, units[0].activations.shape[-1])) for layer in range(2)
    ]
    assert units[0].activations.shape[-1] != 32
    assert model.config._attn_implementation == "eager"
    assert hooks(model) == before


@torch.no_grad()
def test_soft_top_k_is_seen_as_it_runs() -> None:
    """Rows sum to the k of their layer, and the logits are those of the operator."""
    model = build("llama", dtype=torch.float32)
    soft_topk.use(model, k=[2.0, 3.0], eps=0.5)
    expected = model(input_ids=TOKENS, use_cache=False).logits
    attention, _, _, logits = seen(model)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for each, k in zip(attention, (2.0, 3.0), strict=True):
        assert each.sparsity_k.unique().tolist() == [k]
        torch.testing.assert_close(each.weights[:, :, 2:].sum(-1), torch.full((1, 4, 21), k))
        assert each.weights.max() <= 1
        assert each.output_scale.unique().item() == pytest.approx(1 / k)
    torch.testing.assert_close(model(input_ids=TOKENS, use_cache=False).logits, expected)
    assert model.config._attn_implementation == soft_topk.NAME


@pytest.mark.parametrize("eps", [1, 0.5, [0.5, 1.0]])
def test_a_report_says_the_temperature_that_all_layers_have(eps: Any) -> None:
    model = build("llama", dtype=torch.float32)
    soft_topk.use(model, k=2, eps=eps)
    described = describe(model)
    assert described.eps == (None if isinstance(eps, list) else eps)
    assert (described.largest_k, described.has_budget) == (2, True)


@torch.no_grad()
def test_a_window_hides_its_keys() -> None:
    attention, *_ = seen(build("mistral", "sdpa", sliding_window=5, dtype=torch.float32))
    for each in attention:
        assert not each.weights.tril(-5).any()
        torch.testing.assert_close(each.weights.sum(-1), torch.ones(1, 4, 23))
        rows = SeenRows(each)
        assert rows.real_keys.tolist() == [1, 2, 3, 4, *[5] * 19]
        assert torch.equal(rows.distance >= 0, each.weights[0, 0] > 0)


def test_a_report_of_a_model_of_transformers() -> None:
    """Every measure but those of what heads write, and the rows of the store."""
    model = build("qwen3", "sdpa", dtype=torch.float32).train()
    logits: list[object] = []
    model.get_output_embeddings().register_forward_hook(lambda *made: logits.append(made))
    report = cda_cli.inspect(model, "thequickbrownfox" * 3, tokenizer=Letters(), context=20, budget="100kB")
    assert report.tokens[:4] == ["t", "h", "e", "q"]
    assert (report.measures.tokens, report.measures.windows) == (60, 3)
    heads = report.heads.numpy()
    assert len(heads["head"]) == 8
    missing = {name for name, column in heads.items() if (column != column).all()}
    assert missing == {"moved_norm", "written_norm"}
    assert report.units.numpy()["units"].tolist() == [48, 48]
    assert (report.layers.numpy()["largest_activation"] > 0).all()
    report.check("gate_equivalent.min >= 0")
    assert report.row(1, 3, 19).weights.sum() + report.row(1, 3, 19).rest == pytest.approx(1, rel=0.02)
    assert model.training
    assert not logits, "nobody reads them, and they take T × V numbers"
    assert "Qwen3ForCausalLM" in repr(report)


def test_a_feed_forward_of_experts_has_no_units(tmp_path: Path) -> None:
    model = build("mixtral", "sdpa", num_local_experts=2, num_experts_per_tok=1, dtype=torch.float32)
    report = cda_cli.inspect(model, "thequickbrownfox", tokenizer=Letters(), budget="100kB")
    assert report.units.numpy()["units"].tolist() == [0, 0]
    report.check("layers[0].largest_activation > 0")
    report.save(tmp_path / "report.html")
    assert " on a sink.</li>" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_cannot_be_seen_is_one_sentence() -> None:
    bloom = build("bloom", "eager", n_layer=1, n_head=4, dtype=torch.float32)
    with pytest.raises(ConfigError, match="BloomForCausalLM cannot be inspected, since it has an attention of its own"):
        cda_cli.inspect(bloom, "abc", tokenizer=Letters(), budget="100kB")
    bert = build("bert", "sdpa", dtype=torch.float32)  # as a model that looks both ways
    with pytest.raises(ConfigError, match="has queries that see later keys"):
        cda_cli.inspect(bert, "abc", tokenizer=Letters(), budget="100kB")
    assert bert.config._attn_implementation == "sdpa", "it is left as it was"
    with pytest.raises(ConfigError, match="give tokenizer="):
        cda_cli.inspect(bert, "abc")
    with pytest.raises(ConfigError, match="Linear cannot be inspected; give a run"):
        cda_cli.inspect(torch.nn.Linear(2, 2), "abc", tokenizer=Letters())
    llama = build("llama", dtype=torch.float32)
    with pytest.raises(ConfigError, match="1 or more, not 0"):
        cda_cli.inspect(llama, "abc", tokenizer=Letters(), context=0)
    endless = build("recurrent_gemma", "sdpa", num_hidden_layers=1, dtype=torch.float32)
    del endless.config.max_position_embeddings
    with pytest.raises(ConfigError, match="any number of tokens; give context="):
        cda_cli.inspect(endless, "abc", tokenizer=Letters())
    with observing(llama, lambda seen: None), pytest.raises(ConfigError, match="makes a mask of its own"):
        llama(input_ids=TOKENS, attention_mask=torch.zeros(1, 1, 23, 23), use_cache=False)
    with pytest.raises(ConfigError, match="leave tokenizer out"):
        cda_cli.inspect("run", "abc", tokenizer=Letters())


@torch.no_grad()
def test_others_go_on_while_one_is_observed() -> None:
    observed, other = build("llama", dtype=torch.float32), build("llama", dtype=torch.float32)
    expected = other(input_ids=TOKENS, use_cache=False).logits
    heard: list[Any] = []
    with observing(observed, heard.append):
        torch.testing.assert_close(other(input_ids=TOKENS, use_cache=False).logits, expected)
        assert not heard
        assert other.config._attn_implementation != IMPLEMENTATION
