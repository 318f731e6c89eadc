"""The cache of a batch whose rows have other lengths, and rows that move within it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.model import StaticCache, Transformer
from cda_cli.model.length_scaling import AdaptiveScaling
from cda_cli.ops import Backend
from tests.devices import DEVICES
from tests.model.cases import TINY

DEVICE = DEVICES[-1]
LENGTHS = [5, 1, 8]
NORMED: dict[str, Any] = {"position": "rotary", "qk_norm": True, "attention": "coordinate-descent", "dim_head": 16}
OPTIONS: list[tuple[dict[str, Any], bool]] = [
    ({"null_kv": 1, "learned_k": True, "norm": "rmsnorm", "nope_layers": [1], "learned_eps": True}, False),
    ({"eps_anneal_start": 2.0, "qk_norm": False, "position": "learned", "dim_head": 5, "output_gate": True}, False),
    ({"position": "nape", "length_scaling": "log-n", "heads": 4, "kv_heads": 2, "null_kv": 2}, False),
    ({"length_scaling": "adaptive", "learned_k": True}, True),
    ({"kv_heads": 1, "learned_k": True, "output_gate": True, "attn_bias": "all", "eps_anneal_start": 2.0}, True),
]


def build(backend: Backend, **options: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**TINY | NORMED | options), backend)
    for block in model.each_block():
        if block.attention.log_eps is not None:
            torch.nn.init.uniform_(block.attention.log_eps, -0.1, 0.1)
        if isinstance(block.attention.length_scaling, AdaptiveScaling):
            torch.nn.init.normal_(block.attention.length_scaling.to_gamma.weight)
    return model.eval().to(DEVICE)


def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(TINY["vocab_size"], (1, length + 2), generator=generator).to(DEVICE) for length in LENGTHS]


@torch.no_grad()
def by_steps(model: Transformer, cache: StaticCache) -> list[Tensor]:
    """Reads the prompts but for two tokens, each into its row, and then one token of every row at a time."""
    for row, prompt in enumerate(prompts()):
        model(prompt[:, :-2], cache.rows(slice(row, row + 1)))
    cache.lengths_B[: len(LENGTHS)] = torch.tensor(LENGTHS, device=DEVICE)
    found = []
    for place in (-2, -1):
        tokens = torch.cat([prompt[:, place] for prompt in prompts()])
        found.append(model(tokens[:, None], cache.step(len(LENGTHS), max(LENGTHS) + 3 + place))[:, 0])
    return found


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("options", "packed"), OPTIONS, ids=str)
@torch.no_grad()
def test_each_row_is_as_it_is_alone_and_uncached(backend: Backend, options: dict[str, Any], packed: bool) -> None:
    """By the kernels of a step too, and with a matrix that also has the columns of a learned k and of a gate."""
    plain, model = build("torch", **options), build(backend, **options)
    plain.set_attention_eps(0.7)
    model.set_attention_eps(0.7)
    if packed:
        for block in model.each_block():
            block.attention.pack_projection()
    for place, logits in enumerate(by_steps(model, StaticCache(model, 4, torch.float32)), 1):
        for row, prompt in enumerate(prompts()):
            expected = plain(prompt[:, : LENGTHS[row] + place])[0, -1]
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_there_is_room_for_what_is_asked_and_no_more() -> None:
    model = build("torch", null_kv=2)
    cache = StaticCache(model, 3, torch.float32, max(LENGTHS) + 2)
    assert cache.keys.shape[3] == 2 + 10
    whole = by_steps(model, StaticCache(model, 3, torch.float32))
    torch.testing.assert_close(by_steps(model, cache), whole, rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_row_goes_on_where_it_was_moved_to() -> None:
    model = build("torch")
    cache = StaticCache(model, 4, torch.float32)
    by_steps(model, cache)
    cache.move_row(2, 0)
    token = torch.tensor([[7]], device=DEVICE)
    expected = model(torch.cat((prompts()[2], token), 1))[:, -1:]
    found = model(token, cache.step(1, max(LENGTHS) + 3))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
