"""The cross-entropy in parts, which a compiled model computes, equals PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cda_cli.model.loss import cross_entropy
from cda_cli.targets import IGNORE
from tests.devices import DEVICES


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [257, 2048, 50304])
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
    found = torch.compile(cross_entropy, fullgraph=True)(leaf, targets)
    (found_grad,) = torch.autograd.grad(found, leaf, grad)
    assert found.dtype == torch.float32
    assert found[5].item() == 0
    torch.testing.assert_close(found.double(), expected.detach(), atol=1e-5, rtol=1e-6)
    assert found_grad.dtype == dtype
    step = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found_grad.double(), expected_grad, atol=1e-7, rtol=step)
