"""The cross-entropy in parts, which a compiled model computes, equals PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cda_cli.config import ModelConfig
from cda_cli.model import Transformer, state_tensors
from cda_cli.model.loss import PARTS, cross_entropy, padded_vocabulary, vocabulary_loss
from cda_cli.targets import IGNORE
from tests.devices import DEVICES


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("V", "dtype"), [(257, torch.bfloat16), (2048, torch.float32), (50304, torch.bfloat16)])
def test_compiled_it_is_the_cross_entropy(V: int, dtype: torch.dtype, device: str) -> None:
    """Losses and gradients are compared, with ignored targets, and with one logit far above the others."""
    generator = torch.Generator().manual_seed(V)
    logits = 4 * torch.randn(12, V, generator=generator)
    logits[3, 7] = 90.0
    targets = torch.randint(V, (12,), generator=generator)
    targets[3], targets[5], targets[11] = 8, IGNORE, V - 1
    grad = torch.randn(12, generator=generator).to(device)
    logits, targets = logits.to(device, dtype), targets.to(device)

    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())

    leaf = logits.clone().requires_grad_()
    torch._dynamo.reset()
    found = torch.compile(cross_entropy, fullgraph=True)(leaf, targets, V)
    (found_grad,) = torch.autograd.grad(found, leaf, grad)
    assert found.dtype == torch.float32
    assert found[5].item() == 0
    torch.testing.assert_close(found.double(), expected.detach(), atol=1e-5, rtol=1e-6)
    assert found_grad.dtype == dtype
    step = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found_grad.double(), expected_grad, atol=1e-7, rtol=step)


@given(st.integers(2, 300_000))
def test_a_vocabulary_is_padded_as_little_as_its_parts_need(V: int) -> None:
    P = padded_vocabulary(V)
    if V % 64 == 0 or PARTS[0] >= V:
        assert P == V, "what needs no padding changes"
    else:
        assert P % 64 == 0
        assert 0 < P - V < 128
        assert any(P % part == 0 for part in PARTS)


def test_the_vocabulary_of_gpt2_gets_parts() -> None:
    assert [padded_vocabulary(V) for V in (256, 257, 8192, 50257, 50304)] == [256, 257, 8192, 50304, 50304]


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "bias"), [(1025, True), (1025, False), (1101, False)])
def test_padding_is_in_no_softmax_and_has_no_gradient(V: int, bias: bool, dtype: torch.dtype, device: str) -> None:
    """All real logits lie far below 0, where those of the padding would take all of a softmax."""
    torch.manual_seed(V)
    linear = nn.Linear(16, V, bias=bias, device=device)
    direction = torch.randn(16, device=device)
    with torch.no_grad():
        linear.weight -= direction / 4
    x = (3 * direction + torch.randn(2, 5, 16, device=device)).to(dtype)
    targets = torch.randint(V, (2, 5), device=device)
    targets[0, 1], targets[1, 3], targets[0, 0] = IGNORE, V - 1, 0
    grad = torch.randn(2, 5, device=device)
    names = ["x", *dict(linear.named_parameters())]

    def gradients(loss: torch.Tensor, leaf: torch.Tensor, layer: nn.Linear) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, [leaf, *layer.parameters()], grad.to(loss.dtype)))

    layer = linear.to(dtype)
    exact = nn.Linear(16, V, bias=bias, device=device).double()
    exact.load_state_dict(layer.state_dict())
    leaf = x.double().requires_grad_()
    logits = exact(leaf)
    assert logits.max() < -2, "the padding would not be seen"
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    expected_grads = gradients(expected, leaf, exact)

    leaf = x.clone().requires_grad_()
    torch._dynamo.reset()
    found = torch.compile(vocabulary_loss, fullgraph=True, backend="aot_eager")(leaf, layer, targets)
    step = 1e-5 if dtype == torch.float32 else 2**-5
    torch.testing.assert_close(found.double(), expected.detach(), atol=step * logits.abs().max().item(), rtol=0)
    assert found[0, 1].item() == 0
    # The terms of each gradient are products of these.
    atol = 2 * step * grad.abs().max().item() * max(x.abs().max().item(), linear.weight.abs().max().item(), 1)
    for name, one, other in zip(names, gradients(found, leaf, layer), expected_grads, strict=True):
        assert one.shape == other.shape, f"the gradient of {name} has padding"
        torch.testing.assert_close(one.double(), other, atol=atol, rtol=0, msg=name)


@pytest.mark.slow
def test_a_model_keeps_the_width_of_its_vocabulary() -> None:
    """No padding is in a checkpoint or among the logits that are sampled from."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=1031, seq_len=8, dim=16, depth=1, heads=2, attention="softmax", tied_embeddings=True
    )
    model = Transformer(config)
    tokens, targets = torch.randint(1031, (2, 2, 8)).unbind()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, targets_BT=targets), model(tokens, targets_BT=targets))
    assert compiled(tokens).shape == (2, 8, 1031)
    assert state_tensors(model)["token_embedding.weight"].shape == (1031, 16)
