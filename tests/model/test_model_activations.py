"""Each activation of the feed-forward equals its definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cda_cli.config import ModelConfig
from cda_cli.model.activations import ACTIVATIONS
from cda_cli.model.feed_forward import FeedForward
from cda_cli.model.observe import ObservedFeedForward, observing
from cda_cli.ops import reference_soft_topk
from tests.model.cases import build, tiny, tokens


def kept(scores: Tensor) -> Tensor:
    """The soft top-k weights above the tolerance of 1e-3."""
    return F.threshold(reference_soft_topk(scores, 5.0, 0.3).weights, 1e-3, 0.0)


def in_blocks(x: Tensor, weights: Tensor) -> Tensor:
    return torch.where(x > 0, x * x, 0.0) * weights.repeat_interleave(4, -1)


def largest(x: Tensor, n: int) -> Tensor:
    return torch.where(x >= x.sort(-1, descending=True).values[..., n - 1 : n], x, 0.0)


# Of hidden units and of the numbers of the gate, in float64.
DEFINITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": lambda x, gate: x / 2 * (1 + torch.erf(x / 2**0.5)),
    "gelu-tanh": lambda x, gate: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "coordinate-descent": lambda x, gate: reference_soft_topk(x, 5.0, 0.3).weights,
    "relu2": lambda x, gate: torch.where(x > 0, x * x, 0.0),
    "coordinate-descent-linear": lambda x, gate: x * kept(x),
    "coordinate-descent-relu2": lambda x, gate: torch.where(x > 0, x * x, 0.0) * kept(x),
    "coordinate-descent-glu": lambda x, gate: x * kept(gate),
    "hard-topk": lambda x, gate: largest(torch.where(x > 0, x * x, 0.0), 5),
    "reglu": lambda x, gate: torch.where(gate > 0, x * gate, 0.0),
    "blocks": lambda x, router: in_blocks(x, kept(router)),
    "hard-topk-blocks": lambda x, router: in_blocks(x, largest(5 * (router / 0.3).softmax(-1), 5)),
    "sigmoid-topk-blocks": lambda x, router: in_blocks(x, largest((router / 0.3).sigmoid(), 5)),
    "swiglu": lambda x, gate: x * gate / (1 + (-gate).exp()),
}
each_activation = pytest.mark.parametrize("name", sorted(ACTIVATIONS))


def layer_of(name: str) -> FeedForward:
    torch.manual_seed(0)
    return FeedForward(tiny(ff=name), 0, "auto")


def defined(name: str, layer: FeedForward, x: Tensor) -> Tensor:
    """Returns the activations of the layer in float64."""

    def through(linear: torch.nn.Linear) -> Tensor:
        return x.double() @ linear.weight.double().T + linear.bias.double()

    gate = through(layer.proj_gate) if layer.proj_gate is not None else torch.tensor(torch.nan)
    return DEFINITIONS[name](through(layer.proj_in), gate)


def test_every_activation_of_the_configuration_is_there_and_is_tested() -> None:
    assert set(ACTIVATIONS) == set(get_args(ModelConfig.model_fields["ff"].annotation)) == set(DEFINITIONS)


@each_activation
def test_an_activation_is_its_definition_and_is_what_an_observer_sees(name: str) -> None:
    layer, x = layer_of(name), torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1))
    seen: list[ObservedFeedForward] = []
    layer.observer = seen.append
    output = layer(x)
    expected = defined(name, layer, x)
    torch.testing.assert_close(seen[0].activations.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(output, layer.proj_out(expected.float()), rtol=0, atol=1e-5)


@each_activation
def test_its_gradient_is_that_of_its_definition(name: str) -> None:
    """It is compared with differences of the definition in float64, along a direction."""
    layer, x = layer_of(name), torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    weights = torch.randn(24, generator=torch.Generator().manual_seed(3))
    (layer.activation(layer.proj_in(leaf), layer.factors(leaf)) * weights).sum().backward()
    ends = [(defined(name, layer, x + sign * 1e-6 * direction) * weights).sum().item() for sign in (1, -1)]
    assert leaf.grad is not None
    assert (leaf.grad * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-3, abs=1e-3)


@each_activation
def test_a_model_trains_and_is_observed_with_it(name: str) -> None:
    """A gradient reaches each parameter, with an observer and without."""
    model, batch = build(config := tiny(ff=name)), tokens(tiny())
    seen: list[ObservedFeedForward] = []
    with observing(model, lambda one: seen.append(one) if isinstance(one, ObservedFeedForward) else None):
        loss = model(batch[:, :-1], targets_BT=batch[:, 1:]).mean()
    assert [one.activations.shape[-1] for one in seen] == [config.ff_units] * config.depth
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.numel())


def test_a_gate_is_a_third_matrix_of_the_same_width() -> None:
    """ff_mult means the same for every activation: the width of the units."""
    names = {key: tuple(tensor.shape) for key, tensor in layer_of("swiglu").state_dict().items() if "weight" in key}
    assert names == {"proj_in.weight": (24, 12), "proj_gate.weight": (24, 12), "proj_out.weight": (12, 24)}
    assert "proj_gate.weight" not in layer_of("gelu").state_dict()
    matrices = [
        sum(
            p.numel()
            for p in FeedForward(ModelConfig(dim=96, ff_mult=mult, ff=ff), 0, "auto").parameters()
            if p.ndim > 1
        )
        for ff, mult in (("gelu", 4.0), ("swiglu", 8 / 3))
    ]
    assert matrices[0] == matrices[1]


def test_a_block_up_to_the_tolerance_is_left_out_and_learns_nothing() -> None:
    torch.manual_seed(0)
    layer, x = FeedForward(tiny(ff="blocks", ff_k=2, ff_tolerance=0.4), 0, "auto"), torch.randn(1, 1, 12)
    assert layer.proj_gate is not None
    weights = reference_soft_topk(layer.proj_gate(x).double(), 2.0, 0.3).weights.flatten()
    assert 0 < (left_out := weights <= 0.4).sum() < 6
    layer(x).sum().backward()
    assert layer.proj_in.weight.grad is not None
    learned = layer.proj_in.weight.grad.unflatten(0, (6, 4)).abs().sum((1, 2))
    assert torch.equal(learned == 0, left_out)
