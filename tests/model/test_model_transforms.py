"""The model works under torch.func: vmap over grad over functional_call gives the gradients of each sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from cda_cli.model import Transformer
from tests.devices import DEVICES
from tests.model.cases import tiny


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"solver": "iterative", "ff": "coordinate-descent"},
        {"kv_heads": 1, "attn_bias": "all", "normalise": "k", "learned_k": True},
        {"qk_norm": True, "position": "rotary", "learned_k": True, "ff": "coordinate-descent", "null_kv": 2},
    ],
)
def test_gradients_of_each_sample_are_those_of_a_loop(settings: dict[str, Any], device: str) -> None:
    torch.manual_seed(0)
    model = Transformer(tiny(**settings)).to(device)
    parameters = dict(model.named_parameters())
    tokens, targets = torch.randint(0, 23, (2, 3, 11), device=device)

    def loss(parameters: dict[str, Tensor], tokens_T: Tensor, targets_T: Tensor) -> Tensor:
        of_tokens: Tensor = functional_call(
            model, parameters, (tokens_T.unsqueeze(0),), {"targets_BT": targets_T.unsqueeze(0)}
        )
        return of_tokens.mean()

    found = vmap(grad(loss), (None, 0, 0))(parameters, tokens, targets)
    for sample in range(len(tokens)):
        expected = torch.autograd.grad(
            loss(parameters, tokens[sample], targets[sample]), list(parameters.values()), materialize_grads=True,
            allow_unused=True,
        )  # fmt: skip
        for name, right in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][sample], right, rtol=1e-3, atol=1e-5, msg=f"{name} of {sample}")
