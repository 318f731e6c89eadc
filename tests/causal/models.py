"""Tiny models for causal checks: random ones, and planted ones whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cda_cli.causal import Effects, Wanted, check_text
from cda_cli.data import Tokens, evaluation_batches
from cda_cli.model import Transformer
from tests.model.cases import tiny

CPU = torch.device("cpu")
SEQ_LEN = 11
RULES = [
    {"attention": "softmax"},
    {"attention": "coordinate-descent"},
    {"attention": "coordinate-descent", "learned_k": True, "learned_k_bias": 0.5},
]


def build(**changes: Any) -> Transformer:
    """A random model whose weights are so large that each part shows in the loss."""
    torch.manual_seed(0)
    model = Transformer(tiny(tied_embeddings=False, **changes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("to_qkv.weight", "to_logits.weight")):
            nn.init.normal_(parameter, std=0.7)
    return model


def even_heads(**changes: Any) -> Transformer:
    """A random model of coordinate descent whose scores lie so near each other that at ε = 1 nothing is capped."""
    model = build(**{"attention": "coordinate-descent", "null_kv": 0, **changes})
    for block in model.each_block():
        query, _, _ = block.attention.to_qkv.weight.detach().chunk(3)
        query *= 0.01
    return model


def text(count: int, seed: int = 0) -> Tokens:
    """`count` random tokens, which stand for one to three bytes each."""
    ids = torch.randint(23, (count,), generator=torch.Generator().manual_seed(seed)).numpy().astype("uint16")
    return Tokens(ids, (ids % 3 + 1).astype("uint8"), text_bytes=int((ids % 3 + 1).sum()))


def effects_of(
    model: Transformer,
    tokens: Tokens,
    cuts: Sequence[str] = (),
    substitutes: Sequence[str] = (),
    ablated: Sequence[str] = (),
    batch_size: int = 3,
    tolerance: float | None = None,
) -> Effects:
    """What `cda eval` computes for these words of its command line."""
    seq_len = model.config.seq_len
    wanted = Wanted.parse(cuts, substitutes, ablated)

    def batches() -> Any:
        return evaluation_batches(tokens, seq_len, batch_size)

    return check_text(model, wanted, batches, CPU, torch.float32, tolerance)


def differences(effects: Effects) -> dict[str, float]:
    return {effect.intervention.name: effect.difference.value for effect in effects.effects}


WINDOW, FILLER, ASK, MARKERS = 32, 0, 1, 6  # of the planted models; the markers are tokens 2 to 7
STRENGTH = 30.0  # of a score that is meant


def planted(query_of_key: Tensor, heads: int = 1, **changes: Any) -> Transformer:
    """A model of one layer that copies what its last head reads; other heads read evenly and add nothing.

    The residual stream holds a token in its first 8 dimensions and the position in the others. `query_of_key` [C, C]
    says which query looks for which key.
    """
    C = 8 + WINDOW
    shape = {"vocab_size": 8, "seq_len": WINDOW, "dim": C, "depth": 1, "heads": heads, "dim_head": C, "ff_width": 8}
    plain = {"norm": "rmsnorm", "position": "learned", "tied_embeddings": False, "null_kv": 0, "attention": "softmax"}
    model = Transformer(tiny(**{**shape, **plain, "attn_k": 1.0, "attn_eps": 1.0, **changes})).eval()
    (block,) = model.each_block()
    place = torch.eye(C) * (C / 2) ** 0.5  # RMSNorm leaves a vector of two ones as it is
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for norm in (block.attention_norm, block.feed_forward_norm, model.norm):
            nn.init.constant_(norm.weight, (2 / C) ** 0.5)
        model.token_embedding.weight.copy_(torch.eye(C)[:8])
        assert model.position_embedding is not None
        model.position_embedding.weight.copy_(torch.eye(C)[8:])
        query, key, value = block.attention.to_qkv.weight.view(3, heads, C, C)
        query[-1] = query_of_key.T * STRENGTH * C**0.5
        key[-1] = torch.eye(C)
        value[-1, :8, :8] = torch.eye(8)
        block.attention.to_out.weight[:, -C:] = 100 * torch.eye(C)
        model.to_logits.weight[:, :8] = 10 * torch.eye(8)
    assert place.shape == (C, C)
    return model


def content_head(**changes: Any) -> Transformer:
    """ASK looks for a marker, wherever it stands, and any other token for FILLER."""
    look = torch.zeros(8 + WINDOW, 8 + WINDOW)
    look[ASK, 2:8] = 1
    look[[FILLER, *range(2, 8)], FILLER] = 1
    return planted(look, **changes)


def content_text(windows: int) -> Tokens:
    """Each window has one marker among FILLER, and ends with ASK and the marker."""
    ids = np.zeros((windows, WINDOW), dtype="uint16")
    for number, window in enumerate(ids):
        window[1 + 7 * number % 24] = window[-1] = 2 + number % MARKERS
        window[-2] = ASK
    return as_tokens(ids)


def local_head() -> Transformer:
    """Each position looks for the one before it."""
    look = torch.zeros(8 + WINDOW, 8 + WINDOW)
    look[range(9, 8 + WINDOW), range(8, 7 + WINDOW)] = 1
    return planted(look)


def local_text(windows: int) -> Tokens:
    """Two tokens alternate in each window."""
    pairs = [(2 + number % MARKERS, 2 + (number + 1) % MARKERS) for number in range(windows)]
    return as_tokens(np.array([pair * (WINDOW // 2) for pair in pairs], dtype="uint16"))


def as_tokens(ids: Any) -> Tokens:
    flat = np.append(ids.reshape(-1), np.uint16(FILLER))
    return Tokens(flat, np.ones(len(flat), "uint8"), text_bytes=len(flat))
