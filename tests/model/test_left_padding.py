"""Rows of unequal length in one batch, which is padded in front."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.model import StaticCache, Transformer
from cda_cli.model.observe import observing
from cda_cli.model.rules import RULES
from tests.model.cases import build, cases, name, tiny, tokens

ROUNDING = 2e-5
PADDING = (0, 4, 7, 10)  # in front of rows of 11 tokens


def each_row_alone(model: Transformer, batch: Tensor, padding: list[int]) -> list[Tensor]:
    return [model(row[None, before:])[0] for row, before in zip(batch, padding, strict=True)]


def assert_rows_equal(found: Tensor, alone: list[Tensor], padding: list[int]) -> None:
    for number, (row, before) in enumerate(zip(alone, padding, strict=True)):
        torch.testing.assert_close(found[number, before:], row, rtol=0, atol=ROUNDING, msg=f"row {number} differs")


@pytest.mark.parametrize("config", cases(), ids=name)
def test_a_padded_row_has_the_logits_that_it_has_alone(config: ModelConfig) -> None:
    """At once, token by token with a cache, and with an observer, which takes the dense weights."""
    model, batch, padding = build(config), tokens(config, batch=len(PADDING)), list(PADDING)
    padding_B = torch.tensor(padding)
    with torch.no_grad():
        alone = each_row_alone(model, batch, padding)
        assert_rows_equal(model(batch, padding_B=padding_B), alone, padding)
        with observing(model, lambda seen: None):
            assert_rows_equal(model(batch, padding_B=padding_B), alone, padding)
        cache = StaticCache(model, len(batch), torch.float32).rows()
        parts = [model(part, cache, padding_B=padding_B) for part in batch.split([8, 1, 1, 1], 1)]
        assert_rows_equal(torch.cat(parts, 1), alone, padding)


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_token_sees_the_padding(rule: str) -> None:
    """Whatever stands there, the logits of the tokens keep their bits."""
    config = tiny(attention=rule, null_kv=2)
    model, batch, padding_B = build(config), tokens(config, batch=2), torch.tensor([3, 6])
    other = batch.clone()
    other[0, :3], other[1, :6] = 5, 9
    with torch.no_grad():
        one, two = model(batch, padding_B=padding_B), model(other, padding_B=padding_B)
    assert torch.equal(one[0, 3:], two[0, 3:])
    assert torch.equal(one[1, 6:], two[1, 6:])
    assert not torch.equal(one[0, :3], two[0, :3]), "the padding was not read at all, so the test says nothing"


@given(padding=st.lists(st.integers(0, 10), min_size=1, max_size=4), null_keys=st.integers(0, 3))
@settings(max_examples=25)
def test_the_gradients_are_those_of_the_rows_alone(padding: list[int], null_keys: int) -> None:
    config = tiny(null_kv=null_keys, learned_k=True)
    batch = tokens(config, batch=len(padding))

    def gradients(loss: Tensor, model: Transformer) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [leaf for leaf in model.parameters() if leaf.numel()]))

    model = build(config)
    together = model(batch, padding_B=torch.tensor(padding))
    sums = sum(together[row, before:].square().sum() for row, before in enumerate(padding))
    alone = sum(row.square().sum() for row in each_row_alone(model, batch, padding))
    assert isinstance(sums, Tensor)
    assert isinstance(alone, Tensor)
    for found, expected in zip(gradients(sums, model), gradients(alone, model), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
