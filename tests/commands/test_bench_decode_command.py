"""`cda bench-decode`: the figures of the speed of decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cda_cli.config import ModelConfig
from cda_cli.generation.benchmark import bench_decode, bytes_of_step
from cda_cli.model import Transformer
from tests.commands.helpers import Cda, assert_refused

SHORT = ("--prompt-length", 5, "--new-tokens", 3)


def test_the_figures_follow_from_each_other(cda: Cda, finished: Path) -> None:
    result = cda("bench-decode", finished, *SHORT, "--batch-size", 1, "--batch-size", 4, "--json")
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    bandwidth = document["memory_bandwidth_gb_per_s"]
    assert [each["batch_size"] for each in document["measurements"]] == [1, 4]
    for each in document["measurements"]:
        assert (each["prompt_length"], each["new_tokens"]) == (5, 3)
        assert each["time_to_first_token_ms"] > 0
        assert each["tokens_per_second"] == pytest.approx(1e3 * each["batch_size"] / each["step_ms"])
        assert each["bandwidth_gb_per_s"] == pytest.approx(each["step_bytes"] / each["step_ms"] / 1e6)
        assert each["bandwidth_utilization"] == pytest.approx(each["bandwidth_gb_per_s"] / bandwidth)
        ceiling = each["tokens_per_second"] / each["bandwidth_utilization"]
        assert each["ceiling_tokens_per_second"] == pytest.approx(ceiling)


def test_a_person_sees_a_line_for_each_batch_size_in_80_columns(cda: Cda, finished: Path) -> None:
    """Where no lengths are given, each is half of the context."""
    result = cda("bench-decode", finished, "--batch-size", 2, "--batch-size", 3)
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert [line.split()[:3] for line in lines[-2:]] == [["2", "16", "16"], ["3", "16", "16"]]
    assert max(len(line) for line in lines[-3:]) <= 80


@pytest.mark.parametrize(
    ("lengths", "words"),
    [((30, 3), ("context of 32", "--prompt-length")), ((5, 28), ("28 new tokens", "--new-tokens"))],
)
def test_what_does_not_fit_the_context_is_refused(
    cda: Cda, finished: Path, lengths: tuple[int, int], words: tuple[str, ...]
) -> None:
    result = cda("bench-decode", finished, "--prompt-length", lengths[0], "--new-tokens", lengths[1])
    assert_refused(result, *words)


def test_with_a_tolerance_it_tells_what_was_read(cda: Cda, finished: Path) -> None:
    """A short text, behind a null key, is one page, of which all is read: 6 positions in one step, 7 in the next."""
    result = cda("bench-decode", finished, *SHORT, "--max-keys", "auto", "--json")
    assert result.code == 0, result.err
    [measured] = json.loads(result.out)["measurements"]
    assert measured["keys_read"] == measured["keys"] == pytest.approx(1 + 6.5)
    assert measured["mass_left_out"] == 0
    assert_refused(cda("bench-decode", finished, *SHORT, "--max-keys", 128, "--compile"), "exclude", "--max-keys")


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_each_weight_and_each_cached_position_once(tied: bool) -> None:
    """Matrices and cache in bf16, all else in float32; of an embedding, a row for each token of the batch."""
    config = ModelConfig(
        vocab_size=50, seq_len=16, dim=8, depth=2, heads=2, kv_heads=1, dim_head=4, ff_mult=2.0, null_kv=1,
        position="rotary", norm="rmsnorm", tied_embeddings=tied, logits_bias=False, attention="softmax",
    )  # fmt: skip
    matrices = 2 * (8 * 16 + 8 * 8 + (8 * 16 + 16) + (16 * 8 + 8)) + 50 * 8
    norms_and_null_keys = 2 * (2 * 8 + 2 * 4) + 8
    cache = 3 * 2 * 2 * (1 + 10) * 4
    expected = 2 * (matrices + cache) + 4 * (norms_and_null_keys + 3 * 8)
    assert bytes_of_step(Transformer(config), torch.bfloat16, 3, 10) == expected


def test_weights_of_units_that_are_zero_are_not_among_the_bytes() -> None:
    """On a CPU a single row reads a gate, and here nothing else of the feed-forward; several rows read it all."""
    model = Transformer(ModelConfig(seq_len=16, dim=8, depth=2, heads=2, ff_width=32, ff="reglu")).eval()
    for block in model.each_block():
        assert block.feed_forward.proj_gate is not None
        torch.nn.init.constant_(block.feed_forward.proj_gate.bias, -100.0)
    for batch_size, share in ((1, 1 / 3), (2, 1.0)):
        speed = bench_decode(model, torch.float32, 1e9, batch_size=batch_size, prompt_length=4, new_tokens=4)
        assert speed.ff_weights_read == pytest.approx(share)
        whole = bytes_of_step(model, torch.float32, batch_size, 6)
        assert whole - speed.step_bytes == pytest.approx((1 - share) * 2 * 4 * 3 * 8 * 32, abs=1)
