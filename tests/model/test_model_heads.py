"""One kernel each way normalises and rotates queries and keys as the layers do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cda_cli.config import ModelConfig
from cda_cli.model import Transformer
from cda_cli.model.layers import RMSNORM_EPS as EPS
from cda_cli.model.layers import HeadNorm
from cda_cli.model.rotary import RotaryPositions
from cda_cli.ops.triton.heads_launches import heads_backward, heads_forward, norm_and_rotate
from tests.devices import DEVICES

DEVICE = DEVICES[-1]
NAMES = ("query", "key", "value", "rest")
GRADIENTS = ("projected", "gain of queries", "gain of keys")


class Problem:
    """A projection [B, T, H + 2K + rest, D], its layers in float64, and the gradients that reach the heads."""

    def __init__(self, B: int, T: int, H: int, K: int, rest: int, D: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(T)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.heads, self.key_heads, self.dtype = H, K, dtype
        self.projected = (3 * normal(B, T, H + 2 * K + rest, D)).to(dtype)
        self.gains = [normal(D).float() for _ in range(2)]
        self.rotary = RotaryPositions(ModelConfig(dim_head=D, seq_len=T + 3, rotary_scaling="yarn", rotary_factor=4.0))
        # As attention gives them back: [B, H, T, D] in memory, but for the rest.
        self.grads = [normal(B, n, T, D).to(dtype).transpose(1, 2) for n in (H, K, K)] + [
            normal(B, T, rest, D).to(dtype)
        ]

    def by_layers(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns heads and gradients in float64."""
        H, K = self.heads, self.key_heads
        norms = [HeadNorm(gain.shape[0], EPS).double() for gain in self.gains]
        for norm, gain in zip(norms, self.gains, strict=True):
            norm.weight.data.copy_(gain)
        projected = self.projected.double().requires_grad_()
        query, key, value, rest = projected.split((H, K, K, projected.shape[2] - H - 2 * K), 2)
        out = [self.rotary(norms[0](query), 0), self.rotary(norms[1](key), 0), value, rest]
        leaves = (projected, norms[0].weight, norms[1].weight)
        return out, list(torch.autograd.grad(out, leaves, [grad.double() for grad in self.grads]))

    def leaves(self) -> list[Tensor]:
        return [x.to(DEVICE).requires_grad_() for x in (self.projected, *self.gains)]

    def tables(self) -> tuple[Tensor, Tensor]:
        return self.rotary.cos.to(DEVICE), self.rotary.sin.to(DEVICE)

    def by_kernels(self, compiled: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        leaves = self.leaves()
        # What Inductor makes around the kernels is in the compiled model below.
        compile = torch.compile(fullgraph=True, backend="aot_eager")
        called = compile(norm_and_rotate) if compiled else norm_and_rotate
        out = list(called(*leaves, *self.tables(), self.heads, self.key_heads, EPS))
        return out, list(torch.autograd.grad(out, leaves, [grad.to(DEVICE) for grad in self.grads]))

    def compare(self, found: tuple[list[Tensor], list[Tensor]]) -> None:
        """Asserts that each number is within one rounding to its dtype, for numbers of its size."""
        step = 2**-8 if self.dtype == torch.bfloat16 else 2e-6
        expected = self.by_layers()
        for name, one, right in zip(NAMES + GRADIENTS, found[0] + found[1], expected[0] + expected[1], strict=True):
            of_gain = name.startswith("gain")
            assert one.dtype == (torch.float32 if of_gain else self.dtype)
            atol = 2e-6 * max(1.0, right.abs().amax().item() if right.numel() else 0.0)
            message = f"{name} of {tuple(right.shape)} differs"
            torch.testing.assert_close(
                one.double().cpu(), right, rtol=2e-6 if of_gain else step, atol=atol, msg=message
            )


@given(
    B=st.integers(1, 3), T=st.integers(1, 70), H=st.integers(1, 3), K=st.integers(1, 3), rest=st.integers(0, 2),
    D=st.integers(1, 40).map(lambda half: 2 * half), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=15)
def test_the_kernels_do_what_the_layers_do(
    B: int, T: int, H: int, K: int, rest: int, D: int, dtype: torch.dtype
) -> None:
    this = Problem(B, T, H, K, rest, D, dtype)
    this.compare(this.by_kernels())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("D", [16, 32, 64, 80, 96, 128, 256])
def test_each_width_that_is_usual(D: int, dtype: torch.dtype) -> None:
    this = Problem(2, 45, 2, 1, 1, D, dtype)
    this.compare(this.by_kernels())


def test_compiled_it_is_one_graph() -> None:
    this = Problem(2, 33, 4, 2, 1, 16, torch.float32)
    this.compare(this.by_kernels(compiled=True))


def test_gradients_in_any_order_of_memory() -> None:
    """The gradient of a sum is one number for all. That of a transposed product has its channels apart."""
    this = Problem(2, 20, 2, 2, 1, 16, torch.float32)
    apart = torch.randn(2, 16, 2, 20).permute(0, 3, 2, 1)
    this.grads = [torch.ones(()).expand(2, 20, 2, 16), apart, apart, torch.ones(()).expand(2, 20, 1, 16)]
    this.compare(this.by_kernels())


def test_gradients_of_gradients_are_those_of_the_layers() -> None:
    """The kernel of the backward has no gradient of its own."""
    this = Problem(1, 5, 2, 1, 1, 8, torch.float32)
    leaves = this.leaves()
    out = torch.cat(norm_and_rotate(*leaves, *this.tables(), this.heads, this.key_heads, EPS), 2)
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape)
    first = torch.autograd.grad((out * weights).sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)

    def by_layers(*leaves: Tensor) -> Tensor:
        projected, *gains = leaves
        turned = []
        H, K = this.heads, this.key_heads
        for heads, gain in zip(projected.split((H, K, projected.shape[2] - H - K), 2), gains, strict=False):
            normed = torch.nn.functional.rms_norm(heads, heads.shape[-1:], None, EPS) * gain
            turned.append(this.rotary.double()(normed, 0))
        return torch.cat((*turned, projected[:, :, H + K :]), 2)

    doubles = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad((by_layers(*doubles) * weights.double().cpu()).sum(), doubles, create_graph=True)
    exact = torch.autograd.grad(sum(grad.square().sum() for grad in exact), doubles)
    for mine, right in zip(second, exact, strict=True):
        torch.testing.assert_close(mine.double().cpu(), right, rtol=1e-4, atol=1e-4 * right.abs().max().item())


def test_every_element_is_written_and_nothing_else(fenced: list[Tensor]) -> None:
    this = Problem(2, 37, 3, 1, 1, 20, torch.float32)
    this.compare(this.by_kernels())
    assert len(fenced) >= 4, "the operators make their tensors in another way: this test sees nothing"


def test_the_operators_keep_the_rules_of_torch() -> None:
    this = Problem(2, 20, 2, 1, 1, 16, torch.bfloat16)
    tensors = [*(leaf.detach() for leaf in this.leaves()), *this.tables()]
    torch.library.opcheck(heads_forward, (*tensors, 2, 1, EPS))
    torch.library.opcheck(heads_backward, (*(grad.to(DEVICE) for grad in this.grads), *tensors, EPS))


@pytest.mark.parametrize(
    ("attention", "compiled"), [("softmax", False), ("coordinate-descent", False), ("coordinate-descent", True)]
)
def test_a_model_is_the_same_with_and_without(attention: str, compiled: bool) -> None:
    """Its loss and the gradient of each weight are compared with those of the layers, also where attention is compiled.

    A learned k and a gate add heads to the projection. Key heads are fewer than heads, the projection has biases and
    the norms an ε of their own.
    """
    config = ModelConfig(
        vocab_size=13, seq_len=24, dim=24, depth=1, heads=2, dim_head=12, position="rotary", qk_norm=True,
        attention=attention, attn_k=2.0, learned_k=attention != "softmax", output_gate=True, attn_eps=0.5,
        kv_heads=1, attn_bias="qkv", norm_eps=1e-2,
    )  # fmt: skip
    inputs, targets = torch.randint(13, (2, 2, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def loss_and_gradients(backend: str, compiled: bool) -> list[Tensor]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Transformer(config, backend).to(DEVICE)
        if compiled:
            model.each_block()[0].attention.compile()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            loss = model(inputs, targets_BT=targets).mean()
            loss.backward()
        seen = {event.key for event in profiler.key_averages()}
        for operator in ("cda::heads_forward", "cda::heads_backward"):
            assert (operator in seen) == (backend == "triton")
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = loss_and_gradients("torch", compiled=False)
    assert len(expected) > 11
    found = loss_and_gradients("triton", compiled)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    for one, right in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(one, right, rtol=1e-3, atol=1e-6)
