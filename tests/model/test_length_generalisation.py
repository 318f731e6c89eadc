"""What a layer computes with ALiBi in half of its heads and with factors for the number of keys, by its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cda_cli.config import MOST_ALIBI_POSITIONS, parse
from cda_cli.errors import ConfigError
from cda_cli.model import Transformer
from cda_cli.model.alibi import AlibiPositions
from cda_cli.model.attention import Attention
from cda_cli.model.rules import RULES
from tests.model.cases import build, tiny
from tests.model.test_model_rules import DEFINITIONS, K

T, HEADS, WIDTH, NULL = 270, 4, 16, 2  # more positions than bf16 holds in one number


def slopes(heads: int, width: int) -> Tensor:
    """Those of the first half of the heads, 1, 1/2, 1/3 …, as the model rounds them, in float64."""
    scale = width**0.5
    return (scale / torch.arange(1, heads // 2 + 1)).bfloat16().double() / scale


def factors(layer: Attention, x_TC: Tensor, scaling: str) -> Tensor | float:
    """What each query multiplies its scores by in the heads that are scaled, [h, T, 1]."""
    n, module = torch.arange(1, T + 1).double() + NULL, layer.length_scaling
    if scaling == "log-n":
        return (module.scale[:, None] * n.log()).unsqueeze(-1)
    if scaling == "adaptive":
        beta, gamma = module.to_beta(x_TC).T, module.to_gamma(x_TC).T
        return (1 + F.softplus(beta) * (n + 1).log() ** (2 * gamma.tanh())).unsqueeze(-1)
    return 1.0


def defined(layer: Attention, x_TC: Tensor) -> Tensor:
    """The output [T, C] of a layer, from its parameters."""
    heads = layer.to_qkv(x_TC).view(T, 3, HEADS, WIDTH).permute(1, 2, 0, 3)
    query, key, value = heads[0], *(torch.cat((layer.null_kv[part], heads[1 + part]), 1) for part in (0, 1))
    products = query.unsqueeze(2) * key.unsqueeze(1) / WIDTH**0.5
    scaled, factor = products.sum(-1), factors(layer, x_TC, layer.config.length_scaling)
    if layer.config.position == "nape":
        distance = torch.arange(T)[:, None] - torch.arange(-NULL, T)
        distance[:, :NULL] = 0
        biased = products[: HEADS // 2, ..., :-4].sum(-1) - slopes(HEADS, WIDTH)[:, None, None] * distance
        scores = torch.cat((biased, scaled[HEADS // 2 :] * factor))
    else:
        scores = scaled * factor
    seen = torch.ones(T, T + NULL, dtype=torch.bool).tril(NULL)
    weights = DEFINITIONS[layer.config.attention](scores.masked_fill(~seen, -torch.inf))
    return layer.to_out((weights @ value).transpose(0, 1).flatten(1))


@pytest.mark.parametrize(
    ("position", "scaling"),
    [("none", "log-n"), ("none", "adaptive"), ("nape", "none"), ("nape", "log-n"), ("nape", "adaptive")],
)
@pytest.mark.parametrize("rule", sorted(RULES))
@torch.no_grad()
def test_a_layer_is_its_definition(rule: str, position: str, scaling: str) -> None:
    """In float64, at positions of one part and of two."""
    settings: dict[str, Any] = {"attention": rule, "position": position, "length_scaling": scaling}
    shape = {"seq_len": T, "dim": 8, "heads": HEADS, "dim_head": WIDTH, "null_kv": NULL, "attn_k": K, "depth": 1}
    layer = build(tiny(**settings, **shape)).double().each_block()[0].attention
    x_TC = torch.randn(T, 8, generator=torch.Generator().manual_seed(3)).double()
    torch.testing.assert_close(layer(x_TC[None])[0], defined(layer, x_TC), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "width"), [(8, 64), (6, 33), (2, 5)])
def test_the_bias_is_even_in_the_distance_at_every_position(heads: int, width: int, dtype: torch.dtype) -> None:
    """Between the keys of a row it is exact, in bf16 too. From null keys, at 0, bf16 is off by 2⁻¹⁷ of it at most."""
    alibi = AlibiPositions(tiny(seq_len=MOST_ALIBI_POSITIONS, heads=heads, dim_head=width))
    places = torch.tensor([0, 1, 255, 256, 300, 4095, 4097, 40_001, MOST_ALIBI_POSITIONS - 1])
    query, key = (torch.zeros(len(places), 1, number, width, dtype=dtype) for number in (heads, 2))
    query, key = alibi(query, key, places, None)
    query_HTD = query[:, 0, : heads // 2].transpose(0, 1).double() * width**-0.5
    found = query_HTD @ key[:, 0, 0].double().T
    own = found.diagonal(dim1=1, dim2=2)
    expected = slopes(heads, width)[:, None, None] * (places - places[:, None])
    torch.testing.assert_close(found - own.unsqueeze(-1), expected, rtol=1e-12, atol=1e-9)
    assert (own.abs() <= 2**-17 * slopes(heads, width)[:, None] * places).all()
    torch.testing.assert_close(slopes(heads, width), 1 / torch.arange(1, heads // 2 + 1).double(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("scaling", ["log-n", "adaptive"])
def test_the_factors_begin_near_one(scaling: str) -> None:
    """A query of the last position, whose weights would else begin sharp, or flat."""
    model = Transformer(tiny(seq_len=512, dim=64, heads=4, position="none", length_scaling=scaling))
    module = model.each_block()[0].attention.length_scaling
    assert module is not None
    x = torch.randn(100, 64, generator=torch.Generator().manual_seed(3))
    factor = module.factor(torch.tensor([512.0]), lambda name: module.linears[name](x).T)
    torch.testing.assert_close(factor.mean(), torch.tensor(1.0), rtol=0, atol=0.1)
    assert factor.max() < 1.2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": 5}, "an even model.heads and model.kv_heads"),
        ({"heads": 4, "kv_heads": 1}, "an even model.heads and model.kv_heads"),
        ({"dim_head": 4}, "a model.dim_head above 4"),
        ({"seq_len": 2**16 + 1}, "nape positions end at 65536"),
    ],
)
def test_what_nape_cannot_hold_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse({"model": {"dim": 40, "position": "nape", **settings}})
